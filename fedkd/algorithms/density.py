"""An ensemble whose client weights are density ratios of the clients' data (FedAUX's rule: Sattler et al., 2021)."""

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

    from fedkd.algorithms.base import Client, Setup, Update
    from fedkd.core.tensors import Shapes, Tensors

MAX_SAMPLES = 500  # of either kind, from which a density is estimated


@dataclass(frozen=True)
class Density(Ensemble):
    """`Ensemble` with density ratios as client weights (the rule of FedAUX: Sattler et al., 2021).

    For each proxy sample a client uploads the ratio of its own density to the proxy's. That ratio
    (`density_ratio.ratio`, on principal components of the proxy's pixels) is the client's weight in
    ``--aggregator``; ``--aggregator entropy`` or ``variance`` adds the client's own certainty. It reveals more
    about a client's data than soft labels alone.
    """

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        update, memory = super().local_update(setup, client, message)
        weight = client_density_ratio(setup, client, setup.proxy.subset(int(message["round"]))).float()
        return replace(update, tensors={**update.tensors, "weight": weight}), memory

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {**super().upload_spec(setup, client, number), "weight": setup.logits_shape[:1]}

    def check_update(self, setup: Setup, update: Update) -> str:
        weight = update.tensors["weight"]
        is_possible = ((weight >= 0) & (weight <= MAX_SAMPLES**0.9)).all()
        return "" if is_possible else "sent weights that no density ratio has"

    def client_weights(self, setup: Setup, updates: Mapping[int, Update]) -> Tensor:
        ratios: Tensor = torch.stack([update.tensors["weight"] for update in updates.values()])
        return super().client_weights(setup, updates) * ratios


def client_density_ratio(setup: Setup, client: Client, indices: Tensor) -> Tensor:
    """The ratio of the client's density to the proxy's [R] at the proxy samples ``indices``."""

    def features(images: Tensor, purpose: str) -> Tensor:
        order = torch.randperm(len(images), generator=seeds.generator(setup.config.seed, purpose, client.id))
        return density_ratio.features(setup.proxy.images, images[order[:MAX_SAMPLES]])

    private, public = features(client.data.pixels, "density, own"), features(setup.proxy.images, "density, proxy")
    at = density_ratio.features(setup.proxy.images, setup.proxy.images[indices])
    return density_ratio.ratio(private, public, at)
