"""Cronus (Chang et al., 2019): probabilities up, their robust mean down, joint training on both kinds of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedkd.algorithms import aggregators
from fedkd.algorithms.ensemble import OwnTeacher
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client
    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Cronus(OwnTeacher):
    """Clients train on the union of their rows and the proxy with the robust labels.

    ``fraction`` of the clients may be dropped for an image (`aggregators.spectral`). The server's student is
    optional in the paper; here it is distilled from the same labels, so that there is one to compare.
    """

    fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def __post_init__(self) -> None:
        if self.digest_epochs != type(self).digest_epochs:
            raise ValueError("digest_epochs is for a digest apart; clients train on both kinds of images at once")

    def train(self, kit: Kit, client: Client, request: Tensors) -> dict[str, Tensor]:
        if self.down != "labels" or "probs" not in request:
            return super().train(kit, client, request)
        rows = kit.subset(int(request["told"]))
        return kit.fit_jointly(client, kit.own(client), rows, request["probs"], cross_entropy)

    def aggregate(self, logits: Tensor, weights: Tensor) -> Tensor:
        return aggregators.spectral(logits, weights, fraction=self.fraction)
