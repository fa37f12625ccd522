"""Prototypes of classes that a server trains (FedTGP: Zhang et al., 2024)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import seeds
from fedkd.training import loop, optimizers

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors

EXACT = "donot_use_mm_for_euclid_dist"


class Prototypes(nn.Module):
    """The prototypes [C, D] of all classes: a vector for each class, through two linear layers."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(classes, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def prototypes(self) -> Tensor:
        """All of them."""
        prototypes: Tensor = self.layers(self.vectors.weight)
        return prototypes

    def forward(self, x: Tensor) -> Tensor:
        """The Euclidean distances [B, C] of vectors [B, D] from them."""
        return torch.cdist(x, self.prototypes(), compute_mode=EXACT)


def with_margin(distances: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The cross-entropy of -distance, after the margin is added to the distance from the own class."""
    return nn.functional.cross_entropy(-distances - margin * nn.functional.one_hot(labels, distances.shape[1]), labels)


def largest_gap(means: Tensor, present: Tensor) -> float:
    """The largest distance of a class from its nearest other one, by the means over clients [K, C, D] that have it.

    Infinite if fewer than two classes are present.
    """
    counts = present.sum(0)
    known = ((means * present[..., None]).sum(0) / counts.clamp_min(1)[:, None])[counts > 0]
    gaps = torch.cdist(known, known, compute_mode=EXACT).fill_diagonal_(torch.inf)
    return gaps.min(0).values.max().item()


def initial_weights(classes: int, width: int, seed: int) -> dict[str, Tensor]:
    """The weights of a new `Prototypes`."""
    with seeds.seeded(seed):
        return loop.weights_of(Prototypes(classes, width))


def trained(
    weights: Tensors,
    means: Tensor,
    present: Tensor,
    *,
    margin: float,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    device: str,
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """The weights after training by SGD on the class means [K, C, D] where ``present`` [K, C], and the prototypes."""
    network = Prototypes(*means.shape[1:])
    network.load_state_dict(weights)
    network.to(device)
    loop.train(
        network,
        optimizers.sgd(list(network.parameters()), 0.0, 0.0),
        means[present],
        present.nonzero()[:, 1],
        partial(with_margin, margin=min(largest_gap(means, present), margin)),
        lambda vectors: vectors,
        rates=[learning_rate],
        epochs=epochs,
        batch_size=batch_size,
        augmentation=loop.Augmentation(),
        seed=seed,
    )
    with torch.no_grad():
        return loop.weights_of(network), network.prototypes().cpu()
