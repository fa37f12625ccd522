"""Co-Boosting (Dai et al., 2024): as DENSE, but with hard images and learned weights of the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeInt

from fedkd.algorithms.dense import DataFree, Pool, Scale, Weight, divergence
from fedkd.core import seeds
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.training.synthesis import Seen

GAP_TEMPERATURE, DIRECTION_TEMPERATURE, DECAY = 3.0, 4.0, 0.99  # of the authors' code


@dataclass(frozen=True)
class CoBoosting(DataFree):
    """Co-Boosting (Dai et al., 2024): one-shot; hard images and the clients' weights in the ensemble improve in turn.

    The generator minimizes (1 - p(label)) * CE(label) - ``adversarial`` * KL(ensemble || student), p constant. Each
    batch moves the weights by ``step`` against the sign of the gradient of CE(label). The student is trained on images
    whose pixels are moved by ``perturbation`` levels to where a random direction of the ensemble's output increases.
    """

    ignores: ClassVar[frozenset[str]] = DataFree.ignores | {"weighting"}
    temperature: Scale = 4.0
    adversarial: Weight = 1.0
    perturbation: Annotated[NonNegativeInt, Field(le=255)] = 8
    step: Weight = 0.01

    def loss(self, seen: Seen, labels: Tensor) -> Tensor:
        losses = torch.nn.functional.cross_entropy(seen.ensemble, labels, reduction="none")
        hard = (1 - (-losses.detach()).exp()) * losses
        gap = GAP_TEMPERATURE**2 * divergence(seen.ensemble / GAP_TEMPERATURE, seen.student / GAP_TEMPERATURE)
        return hard.mean() - self.adversarial * gap.mean()

    def client_weights(self, setup: Setup, examples: Sequence[int]) -> Tensor:
        return torch.full((len(examples),), 1 / len(examples))

    def reweighted(self, setup: Setup, pool: Pool, epoch: int, seed: int) -> Pool:
        order = torch.randperm(len(pool.images), generator=seeds.generator(seed, "weights"))
        shown = replace(pool, images=pool.images[order], labels=pool.labels[order])
        logits = pool.logits(setup, super().views(setup, shown, seeds.derive(seed, "weights")))
        weights, size = pool.weights, setup.config.distill_batch_size
        for part, labels in zip(torch.split(logits, size, 1), torch.split(shown.labels, size), strict=True):
            weights = stepped(weights, part, labels, self.step * DECAY**epoch) if len(labels) else weights
        return replace(pool, weights=weights)

    def views(self, setup: Setup, pool: Pool, seed: int) -> Tensor:
        from fedkd.training import synthesis

        drawn = seeds.generator(seed, "directions")
        return synthesis.perturbed(
            pool.ensemble(setup),
            super().views(setup, pool, seed),
            2 * torch.rand(len(pool.images), setup.classes, generator=drawn) - 1,
            size=self.perturbation,
            temperature=DIRECTION_TEMPERATURE,
            batch_size=setup.config.distill_batch_size,
            device=setup.trainer.device,
            precision=setup.trainer.precision,
        )

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return super().teacher_probs(setup, logits, torch.ones_like(weights))


def stepped(weights: Tensor, logits: Tensor, labels: Tensor, step: float) -> Tensor:
    """The weights [K] after a step against the sign of the gradient of CE(label), within 0 and 1.

    CE is that of sum_k w_k f_k / sum_k w_k for the clients' logits f [K, B, C].
    """
    mean = weighted_mean(logits, weights[:, None])
    error = mean.softmax(-1) - torch.nn.functional.one_hot(labels, logits.shape[-1])
    gradient = (error * (logits - mean)).sum((1, 2))  # times B sum_k w_k
    return (weights - step * gradient.sign()).clamp(0, 1).to(weights)
