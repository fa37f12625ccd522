"""FedDF (Lin et al., 2020): the averaged model is distilled from the mean logits of the clients' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.algorithms import aggregators
from fedkd.algorithms.weight_ensemble import ServerStep, WeightEnsemble

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup, Update


@dataclass(frozen=True)
class FedDF(WeightEnsemble):
    """FedDF (Lin et al., 2020): each architecture's mean is distilled from the mean logits of all clients' models.

    A student with an architecture of its own continues from the last round. Algorithms 1 and 3. The paper's cosine
    decay and early stopping are options of the run. Left out: dropping of bad clients.
    """

    @property
    def server_step(self) -> ServerStep:
        return ServerStep(aggregators.mean_logits, mean_logits_targets)


def mean_logits_targets(
    setup: Setup, updates: Mapping[int, Update], logits: Tensor, images: Tensor, seed: int
) -> Tensor:
    """softmax(weighted mean of the clients' logits) [R, C]."""
    weights = setup.distillation.client_weights([update.examples for update in updates.values()])
    return aggregators.mean_logits(logits, weights)
