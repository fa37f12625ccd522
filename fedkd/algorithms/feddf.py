"""FedDF (Lin et al., 2020): the averaged model is distilled from the mean logits of the clients' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from fedkd.algorithms import aggregators
from fedkd.algorithms.weight_ensemble import ServerStep, WeightEnsemble

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup, Update

CHANCE = 1.2  # times the accuracy of a guess: clients below it are dropped
DEVIATIONS = 1.5  # below the mean, from which on a client is an outlier


@dataclass(frozen=True)
class FedDF(WeightEnsemble):
    """FedDF (Lin et al., 2020): each architecture's mean is distilled from the mean logits of all clients' models.

    A student with an architecture of its own continues from the last round. Algorithms 1 and 3. The paper's cosine
    decay and early stopping are options of the run. With ``drop`` the worst clients are left out (`kept`), as in the
    authors' code; this needs ``--validation``.
    """

    drop: bool = False

    @property
    def needs_validation(self) -> bool:
        return self.drop

    @property
    def server_step(self) -> ServerStep:
        return ServerStep(aggregators.mean_logits, mean_logits_targets)

    def selected(
        self, setup: Setup, updates: Mapping[int, Update]
    ) -> tuple[Mapping[int, Update], Mapping[int, Update]]:
        if not self.drop:
            return updates, updates
        images, labels = setup.validation.pixels, setup.validation.labels
        predicted = {c: setup.trainer.predict(setup.model_of(c), u.tensors, images) for c, u in updates.items()}
        accuracies = {c: (logits.argmax(-1) == labels).double().mean().item() for c, logits in predicted.items()}
        averaged, ensemble = ({c: updates[c] for c in clients} for clients in kept(accuracies, setup.classes))
        return averaged, ensemble


def kept(accuracies: Mapping[int, float], classes: int) -> tuple[list[int], list[int]]:
    """The clients that are averaged, and those in the ensemble, from their validation accuracies.

    Clients that are hardly better than a guess are left out of both, unless all are. If none is left out, outliers are
    left out of the ensemble: clients that are 1.5 standard deviations worse than the mean, both of all but the best.
    """
    good = [client for client, accuracy in accuracies.items() if accuracy >= CHANCE / classes] or list(accuracies)
    others = sorted(accuracies.values())[:-1]
    if len(good) < len(accuracies) or not others:
        return good, good
    lowest = fmean(others) - DEVIATIONS * pstdev(others)
    return good, [client for client in good if accuracies[client] >= lowest]


def mean_logits_targets(
    setup: Setup, updates: Mapping[int, Update], logits: Tensor, images: Tensor, seed: int
) -> Tensor:
    """softmax(weighted mean of the clients' logits) [R, C]."""
    weights = setup.distillation.client_weights([update.examples for update in updates.values()])
    return aggregators.mean_logits(logits, weights)
