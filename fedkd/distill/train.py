"""Training a network with or without teachers: one loop for students and teachers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedkd import models
from fedkd.core import seeds
from fedkd.core.errors import RunError
from fedkd.training import loop, optimizers
from fedkd.training.terms.objective import DistillationObjective

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.task import Task
    from fedkd.training.terms import Term


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number from 1, accuracy and loss on the validation images, and its duration."""

    number: int
    accuracy: float
    loss: float
    seconds: float


def build_untrained(task: Task, config: DistillConfig, model: str, *path: int) -> nn.Module:
    """An untrained network; the same for the same seed and path."""
    with seeds.seeded(seeds.derive(config.seed, "initial", model, *path)):
        module = models.build(model, task.classes, config.norm)
    return module.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def train(
    module: nn.Module,
    task: Task,
    config: DistillConfig,
    *,
    epochs: int,
    seed: int,
    terms: Sequence[Term] = (),
    teachers: Sequence[nn.Module] = (),
) -> Iterator[Epoch]:
    """Train ``module`` in place on the labels and the loss terms, and yield after each epoch.

    Batches and augmentation depend only on ``seed``, so that students with and without a teacher are paired.

    Raises:
        RunError: the validation loss is not finite.

    """
    with seeds.seeded(seeds.derive(seed, "adapters")):
        objective = objective_of(task, config, module, teachers, terms)
    steps = epochs * -(-len(task.train) // config.batch_size)
    rate = optimizers.cosine(config.learning_rate, steps)
    optimizer = optimizers.sgd(list(objective.parameters()), rate, config.momentum, config.weight_decay)
    targets = torch.stack([task.train.labels, torch.arange(len(task.train))], 1)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loop.train(
            objective,
            optimizer,
            task.train.pixels,
            targets,
            objective.loss,
            task.scaling,
            epochs=1,
            batch_size=config.batch_size,
            augmentation=loop.Augmentation(config.augment, task.flip),
            seed=seeds.derive(seed, "epoch", epoch),
        )
        logits = loop.predict(module, task.validation.pixels, task.scaling)
        accuracy, loss = loop.score(logits, task.validation.labels)
        if not math.isfinite(loss):
            raise RunError(
                f"Training diverged in epoch {epoch}; "
                f"lower --learning-rate {config.learning_rate:g} or the weight of a loss term."
            )
        yield Epoch(epoch, accuracy, loss, time.perf_counter() - start)


def objective_of(
    task: Task, config: DistillConfig, module: nn.Module, teachers: Sequence[nn.Module], terms: Sequence[Term]
) -> DistillationObjective:
    """The objective of a student with its teachers."""
    sample = task.scaling(task.train.pixels[:2])
    labels = task.train.labels.to(task.device)
    return DistillationObjective(module, teachers, terms, sample, labels, config.teacher_weighting).to(task.device)
