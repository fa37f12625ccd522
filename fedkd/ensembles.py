"""Teachers: how the clients' answers become one distribution for each proxy image.

Shapes: logits [K, N, C] of K clients, already divided by the temperature; weights broadcastable to
[K, N], not negative. Each function returns probs [N, C] whose rows sum to one. Sums over clients
run in float64 and in the order of the clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

Scale = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


def mean_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """softmax(sum_k w_k f_k) (FedDF: Lin et al., 2020). One overconfident client can outvote the rest."""
    return _mean(logits, weights).softmax(-1).to(logits.dtype)


def mean_probs(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k softmax(f_k): simple averaging (DS-FL: Itahara et al., 2020). Every vote is bounded."""
    return _mean(logits.double().softmax(-1), weights).to(logits.dtype)


def era(logits: Tensor, weights: Tensor, *, temperature: Scale = 0.1) -> Tensor:
    """Entropy reduction: softmax(p / T) of the mean *probabilities* p (DS-FL: Itahara et al., 2020).

    It sharpens the head and lifts the far tail: a class of probability zero gets one.
    """
    mean = _mean(logits.double().softmax(-1), weights)
    return (mean / temperature).softmax(-1).to(logits.dtype)


def entropy(logits: Tensor, weights: Tensor, *, sharpness: Scale = 1.0) -> Tensor:
    """Mean of probabilities, each client weighted for each image by exp(-sharpness * H(p_k)).

    Who is sure counts more (the unlabeled analogue of FedGEMS: Cheng et al., 2021).
    """
    log_probs = logits.double().log_softmax(-1)
    uncertainty = -(log_probs.exp() * log_probs).sum(-1)
    return _mean(log_probs.exp(), weights * (-sharpness * uncertainty).exp()).to(logits.dtype)


def variance(logits: Tensor, weights: Tensor) -> Tensor:
    """softmax(sum_k a_k f_k), a_k(x) = Var_c f_k / sum Var: Fed-ET's weights (Cho et al., 2022)."""
    spread = logits.double().var(-1, correction=0)
    return _mean(logits, weights * (spread + 1e-12)).softmax(-1).to(logits.dtype)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over clients [N, C], in float64, added up in their order."""
    shares = weights.double().expand(values.shape[:2])
    shares = shares / shares.sum(0)
    total = values[0].double() * shares[0, :, None]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += value.double() * share[:, None]
    return total
