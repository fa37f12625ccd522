"""Cronus (Chang et al., 2019): probabilities up, their robust mean down, joint training on both kinds of samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedkd.algorithms import aggregators
from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy
from fedkd.core.soft_labels import SoftLabels
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Distillation, Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class Cronus(Ensemble):
    """Cronus (Chang et al., 2019): joint training on the client's samples and on proxy samples with robust labels.

    ``fraction`` of the clients may be dropped for a sample (`aggregators.spectral`). The global student is optional
    in the paper; here it is distilled from the same labels, so that there is one to compare.
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "temperature", "loss"})
    uplink: ClassVar[str] = "probs"
    downlink: Downlink = "labels"
    fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def __post_init__(self) -> None:
        if self.local_distill_epochs != type(self).local_distill_epochs:
            raise ValueError("local-distill-epochs does not apply: clients train on both kinds of samples at once")

    def distillation(self, setup: Setup) -> Distillation:
        return soft_cross_entropy(setup, partial(aggregators.spectral, fraction=self.fraction))

    def train_client(self, setup: Setup, client: Client, message: Tensors) -> dict[str, Tensor]:
        if self.downlink != "labels" or "probs" not in message:
            return super().train_client(setup, client, message)
        images = setup.proxy.select(setup.proxy.subset(int(message["prev"])))
        return setup.trainer.train(
            client,
            setup.local_weights(client),
            soft_labels=SoftLabels(images, message["probs"]),
            soft_objective=cross_entropy,
        )
