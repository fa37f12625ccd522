"""Training a network, alone or pulled by teachers: one loop for students and teachers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd import ensembles, layers, learning, models, optimizers, seeds
from fedkd.distillation.pulls import Batch
from fedkd.distillation.terms import Pair
from fedkd.layers import Seen, Watched

if TYPE_CHECKING:
    from fedkd.distillation.config import DistillConfig
    from fedkd.distillation.task import Task
    from fedkd.distillation.terms import Term


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
    """
    with seeds.seeded(seeds.derive(seed, "adapters")):
        lesson = Lesson(module, teachers, terms, config.votes, task).to(task.device)
    steps = epochs * -(-len(task.train) // config.batch_size)
    rate = optimizers.cosine(config.learning_rate, steps)
    step = optimizers.sgd(list(lesson.parameters()), rate, config.momentum, config.weight_decay)
    targets = torch.stack([task.train.labels, torch.arange(len(task.train))], 1)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        learning.descend(
            lesson,
            step,
            task.train.pixels,
            targets,
            lesson.loss,
            task.scaling,
            epochs=1,
            batch_size=config.batch_size,
            augmentation=learning.Augmentation(config.augment, task.flip),
            seed=seeds.derive(seed, "epoch", epoch),
        )
        answers = learning.predict(module, task.validation.pixels, task.scaling)
        yield Epoch(epoch, *learning.score(answers, task.validation.labels), time.perf_counter() - start)


class Lesson(nn.Module):
    """A student with everything that pulls it. Its parameters are the student's and the terms' adapters'."""

    def __init__(
        self, student: nn.Module, teachers: Sequence[nn.Module], terms: Sequence[Term], votes: str, task: Task
    ) -> None:
        super().__init__()
        sample = task.scaling(task.train.pixels[:2])
        pair = Pair(
            layers.shapes(student, sample),
            tuple(layers.shapes(teacher, sample) for teacher in teachers),
            task.classes,
            task.train.labels,
        )
        pulls = [term.build(pair) for term in terms]
        self.pulls = nn.ModuleList(pulls)
        said = [weight for term in terms if (weight := term.labels()) is not None]
        self.hard, self.votes = sum(said) if said else 1.0, votes
        self.student = Watched(student, [name for pull in pulls for name in pull.student_layers])
        # In a tuple, so that they are no part of this module: not trained, not put into training mode.
        self.teachers = tuple(
            Watched(teacher, [name for pull in pulls if pull.teacher_layers for name in pull.teacher_layers[k]])
            for k, teacher in enumerate(teachers)
        )

    def forward(self, x: Tensor) -> tuple[Seen, list[Seen]]:
        """What the student gives, and what each teacher gives."""
        with torch.no_grad():
            taught = [teacher(x) for teacher in self.teachers]
        return self.student(x), taught

    def loss(self, seen: tuple[Seen, list[Seen]], targets: Tensor) -> Tensor:
        """The cross-entropy with the labels, by its weight, and all terms; targets [B, 2] are labels and rows."""
        student, teachers = seen
        labels, rows = targets.unbind(1)
        batch = Batch(student, teachers, shares(teachers, labels, self.votes), labels, rows)
        pulled: list[Tensor] = [pull(batch) for pull in self.pulls]
        hard = self.hard * nn.functional.cross_entropy(student.logits, labels) if self.hard else 0.0
        return sum(pulled, torch.as_tensor(hard))


def shares(teachers: Sequence[Seen], labels: Tensor, votes: str) -> Tensor:
    """What each teacher weighs on each image [K, B]; the columns sum to one.

    ``entropy``: by the certainty of its probabilities, as `ensembles.entropy` weighs clients. ``agreement``: CA-MKD's
    (1 - softmax_k(CE_k)) / (K - 1) of its cross-entropy with the label (Zhang et al., 2022).
    """
    count = len(teachers)
    if count < 2 or votes == "equal":
        return torch.full((count, len(labels)), 1 / max(count, 1), device=labels.device)
    answers = torch.stack([seen.logits for seen in teachers])
    if votes == "entropy":
        return ensembles.certainty(answers, torch.ones(count, 1, device=labels.device)).float()
    costs = torch.stack([nn.functional.cross_entropy(logits, labels, reduction="none") for logits in answers])
    return (1 - costs.softmax(0)) / (count - 1)
