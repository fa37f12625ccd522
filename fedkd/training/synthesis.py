"""Images that a server makes without data: a generator learns from frozen networks (DENSE, Co-Boosting)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.core import seeds
from fedkd.training import loop, optimizers

if TYPE_CHECKING:
    from fedkd.data.scaling import Scaling
    from fedkd.training.precision import Precision

NOISE, LEARNING_RATE, BETA1 = 256, 1e-3, 0.5  # of the authors' code of both methods


class Generator(nn.Module):
    """Images [B, S, S, 3], from 0 to 255, of noise [B, 256]; layers and initial weights are those of DENSE's code."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side, self.start = side, -(-side // 4)
        self.project = nn.Linear(NOISE, 2 * width * self.start**2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Sigmoid(),
        )
        for layer in (self.project, *self.layers):
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d)), 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, noise: Tensor) -> Tensor:
        """The images."""
        maps: Tensor = self.layers(self.project(noise).view(len(noise), -1, self.start, self.start))
        return 255 * maps[..., : self.side, : self.side].float().permute(0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Frozen networks with shares [K] that sum to one; returns the mean of their logits [B, C] for images."""

    networks: Sequence[nn.Module]
    shares: Tensor
    scaling: Scaling

    def __call__(self, images: Tensor) -> Tensor:
        """Of images [B, S, S, 3]."""
        x = self.scaling(images)
        logits = torch.stack([network(x) for network in self.networks])
        return (self.shares.to(logits)[:, None, None] * logits).sum(0)


class Seen(NamedTuple):
    """The logits [B, C] of an ensemble and of a student for generated images, and `distances` of the ensemble's layers.

    ``distance`` is their sum over layers, the mean over networks; zero without BatchNorm layers.
    """

    ensemble: Tensor
    student: Tensor
    distance: Tensor


@contextmanager
def distances(networks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """How far the inputs of BatchNorm layers are from what these saw in training, while the block runs.

    For each layer: the Euclidean distances of means and of variances from the running ones, added up.
    """
    found: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1).float()
        found.append((x.mean(1) - layer.running_mean).norm() + (x.var(1, correction=0) - layer.running_var).norm())

    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, _BatchNorm)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers if layer.track_running_stats]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Synthesis(nn.Module):
    """A generator with its noise, both of which are trained; returns what is `Seen` of the images at some indices."""

    def __init__(self, generator: Generator, noise: Tensor, ensemble: Ensemble, student: Ensemble) -> None:
        super().__init__()
        self.generator, self.noise = generator, nn.Parameter(noise)
        self.ensemble, self.student = ensemble, student
        self.images = torch.zeros(0)

    def forward(self, indices: Tensor) -> Seen:
        """And keep the images."""
        images = self.generator(self.noise)
        self.images = images.detach()
        with distances(self.ensemble.networks) as found:
            of_ensemble = self.ensemble(images)
        distance = torch.stack(found).sum() / len(self.ensemble.networks) if found else images.new_zeros(())
        return Seen(of_ensemble[indices], self.student(images)[indices], distance)


def generated(
    ensemble: Ensemble,
    student: Ensemble,
    labels: Tensor,
    loss: Callable[[Seen, Tensor], Tensor],
    *,
    side: int,
    width: int,
    steps: int,
    seed: int,
    device: str,
    precision: Precision,
) -> Tensor:
    """Images uint8 [B, S, S, 3], one for each label: of a new generator, after the step at which the loss was lowest.

    Generator and noise are trained by Adam.
    """
    with seeds.seeded(seed):
        network = _Synthesis(Generator(side, width), torch.randn(len(labels), NOISE), ensemble, student).to(device)
    lowest, best = torch.tensor(torch.inf, device=device), torch.zeros((), device=device)

    def objective(seen: Seen, labels: Tensor) -> Tensor:
        nonlocal lowest, best
        value = loss(seen, labels)
        best = torch.where(value < lowest, network.images, best)
        lowest = torch.minimum(value.detach(), lowest)
        return value

    step = optimizers.adam(list(network.parameters()), beta1=BETA1)
    _train(network, step, labels, objective, rate=LEARNING_RATE, steps=steps, seed=seed, precision=precision)
    return best.round().to(torch.uint8).cpu()


class _Shifted(nn.Module):
    """Images and a shift of them, which is trained; returns the logits of an ensemble at some indices."""

    def __init__(self, images: Tensor, ensemble: Ensemble) -> None:
        super().__init__()
        self.images, self.shift = images, nn.Parameter(torch.zeros(images.shape, device=images.device))
        self.ensemble = ensemble

    def forward(self, indices: Tensor) -> Tensor:
        """The logits."""
        return self.ensemble(self.images + self.shift)[indices]


def perturbed(
    ensemble: Ensemble,
    images: Tensor,
    directions: Tensor,
    *,
    size: int,
    temperature: float,
    batch_size: int,
    device: str,
    precision: Precision,
) -> Tensor:
    """Images uint8 [N, S, S, 3] whose pixels are moved by ``size``, each to where sum_c d_c p_c increases.

    p are the ensemble's probabilities at the temperature, d the directions [N, C].
    """
    moved = []
    for part, direction in zip(*(torch.split(each, batch_size) for each in (images, directions)), strict=True):
        network = _Shifted(part.to(device), ensemble)
        step = optimizers.sgd([network.shift], 0.0, 0.0)
        objective = partial(_against, temperature=temperature)
        _train(network, step, direction, objective, rate=1.0, steps=1, seed=0, precision=precision)
        moved.append((part + size * network.shift.detach().sign().cpu()).clamp(0, 255).to(torch.uint8))
    return torch.cat(moved)


def _against(logits: Tensor, directions: Tensor, temperature: float) -> Tensor:
    return -(directions * (logits / temperature).softmax(-1)).sum()


def _train(
    network: nn.Module,
    step: optimizers.Step,
    targets: Tensor,
    objective: loop.Objective,
    *,
    rate: float,
    steps: int,
    seed: int,
    precision: Precision,
) -> None:
    """Train a network whose inputs are the numbers of its own images, all of them in each step."""
    loop.train(
        network,
        step,
        torch.arange(len(targets)),
        targets,
        objective,
        lambda numbers: numbers,
        rates=[rate],
        epochs=steps,
        batch_size=len(targets),
        augmentation=loop.Augmentation(),
        seed=seed,
        precision=precision,
    )
