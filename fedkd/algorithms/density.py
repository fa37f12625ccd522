"""An ensemble in which a client counts where its data is dense (FedAUX's rule: Sattler et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedkd.algorithms import density_ratio
from fedkd.algorithms.ensemble import Ensemble
from fedkd.core import seeds
from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Update
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit

MOST = 500  # images of either kind that a density is estimated from


@dataclass(frozen=True)
class Density(Ensemble):
    """Beside its logits a client sends, for each proxy image, how much denser it lies in its data than in the proxy.

    That ratio (`density_ratio.ratio`, in the principal components of the proxy's pixels) weighs the client's answer in
    ``--aggregator``; ``--aggregator entropy`` or ``variance`` adds the client's own certainty to it. It tells more
    about a client's data than soft labels alone.
    """

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        update, memory = super().local(kit, client, request)
        weight = density_of(kit, client, kit.subset(int(request["round"]))).float()
        return replace(update, tensors={**update.tensors, "weight": weight}), memory

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {**super().sends(kit, state, client), "weight": kit.answers()[:1]}

    def objection(self, kit: Kit, update: Update) -> str:
        weight = update.tensors["weight"]
        return "" if ((weight >= 0) & (weight <= MOST**0.9)).all() else "sent weights that no density ratio has"

    def weigh(self, kit: Kit, updates: Mapping[int, Update]) -> Tensor:
        return super().weigh(kit, updates) * torch.stack([update.tensors["weight"] for update in updates.values()])


def density_of(kit: Kit, client: Client, rows: Tensor) -> Tensor:
    """The ratio of the client's density to the proxy's [R] at the proxy's ``rows``."""

    def some(images: Tensor, purpose: str) -> Tensor:
        order = torch.randperm(len(images), generator=seeds.generator(kit.config.seed, purpose, client.id))
        return density_ratio.features(kit.proxy, images[order[:MOST]])

    private, public = some(client.data.pixels, "density, own"), some(kit.proxy, "density, proxy")
    return density_ratio.ratio(private, public, density_ratio.features(kit.proxy, kit.proxy[rows]))
