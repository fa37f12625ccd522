"""Training a network, alone or pulled by teachers: one loop for students and teachers."""

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
    """One that has ended: its number from 1, accuracy and loss on the validation images, and what it took."""

    number: int
    accuracy: float
    loss: float
    seconds: float


def fresh(task: Task, config: DistillConfig, model: str, *path: int) -> nn.Module:
    """A network that has learned nothing; the same for the same seed and path."""
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
    """Train ``module`` in place, epoch by epoch: on the labels, and on what the terms pull to.

    Batches and their augmentation follow ``seed`` alone, so that students with and without a teacher are paired.

    Raises:
        RunError: the loss is no number any more.

    """
    with seeds.seeded(seeds.derive(seed, "adapters")):
        lesson = objective_of(task, config, module, teachers, terms)
    steps = epochs * -(-len(task.train) // config.batch_size)
    rate = optimizers.cosine(config.learning_rate, steps)
    step = optimizers.sgd(list(lesson.parameters()), rate, config.momentum, config.weight_decay)
    targets = torch.stack([task.train.labels, torch.arange(len(task.train))], 1)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loop.train(
            lesson,
            step,
            task.train.pixels,
            targets,
            lesson.loss,
            task.scaling,
            epochs=1,
            batch_size=config.batch_size,
            augmentation=loop.Augmentation(config.augment, task.flip),
            seed=seeds.derive(seed, "epoch", epoch),
        )
        answers = loop.predict(module, task.validation.pixels, task.scaling)
        accuracy, loss = loop.score(answers, task.validation.labels)
        if not math.isfinite(loss):
            raise RunError(
                f"Training diverged in epoch {epoch}; lower --learning-rate {config.learning_rate:g} or a weight."
            )
        yield Epoch(epoch, accuracy, loss, time.perf_counter() - start)


def objective_of(
    task: Task, config: DistillConfig, module: nn.Module, teachers: Sequence[nn.Module], terms: Sequence[Term]
) -> DistillationObjective:
    """A student of the task beside its teachers."""
    sample = task.scaling(task.train.pixels[:2])
    labels = task.train.labels.to(task.device)
    return DistillationObjective(module, teachers, terms, sample, labels, config.teacher_weighting).to(task.device)
