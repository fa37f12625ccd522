"""Soft labels: logits as probabilities, and weighted means of them over clients or teachers.

Shapes: logits [K, N, C] of K clients, N samples and C classes; weights broadcastable to [K, N], not negative.
Sums over clients run in float64 and in the order of the clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SoftLabels:
    """Images [R, H, W, 3] uint8 and their targets [R, C]: probabilities, or whatever the objective compares."""

    images: Tensor
    targets: Tensor


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / T) as it is sent: computed in float64, rounded once."""
    return (logits.double() / temperature).softmax(-1).float()


def mean_probs(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k softmax(f_k) [N, C]: the weighted mean of probabilities (DS-FL: Itahara et al., 2020).

    The influence of every client is bounded.
    """
    return weighted_mean(logits.double().softmax(-1), weights).to(logits.dtype)


def certainty(logits: Tensor, weights: Tensor, sharpness: float = 1.0) -> Tensor:
    """Weights [K, N] proportional to w_k * exp(-sharpness * H(p_k)); they sum to one over the clients."""
    log_probs = logits.double().log_softmax(-1)
    uncertainty = -(log_probs.exp() * log_probs).sum(-1)
    return (normalized(weights, logits).log() - sharpness * uncertainty).softmax(0)


def normalized(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [K, N] that sum to one over the clients; uniform where all of them are zero."""
    weights = weights.double().expand(values.shape[:2])
    weights = weights.masked_fill(weights.sum(0) == 0, 1.0)
    return weights / weights.sum(0)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over clients [N, C], in float64."""
    return weighted_sum(values, normalized(weights, values)[..., None])


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k v_k [N, C] for weights [K, N, 1 or C], in float64, added up in the order of the clients."""
    total = values[0].double() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += value.double() * weight
    return total
