"""Contrastive distillation: which teacher embedding belongs to a student's (CRD: Tian et al., 2020).

Embeddings have length one. Scores are g = s't / temperature, and exp(g) is divided by a constant Z, as the
authors' code does: so it stands for a probability over the N training rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from fedkd.training.losses.vectors import unit

if TYPE_CHECKING:
    from torch import Tensor


def crd(
    student: Tensor,
    teacher: Tensor,
    students: Tensor,
    teachers: Tensor,
    total: int,
    *,
    constants: tuple[float, float] = (1.0, 1.0),
    temperature: float = 0.07,
) -> Tensor:
    """-log h(own row) - sum_k log(1 - h(other row k)), from either side; h = x / (x + K / N), x = exp(g) / Z.

    student and teacher [B, E]; candidates of either side [B, 1 + K, E], that of the same row first; ``total`` is N.
    The student is compared with the teacher's candidates, and the other way about. ``constants`` are Z of the student
    and of the teacher as anchors, see `normalizers`; Z = 1 is the paper's formula. Mean over the batch, sum over
    sides. A learned projection of the teacher gets gradients as well.
    """
    share = math.log((students.shape[1] - 1) / total)
    loss = student.new_zeros(())
    for anchor, candidates, constant in ((student, teachers, constants[0]), (teacher, students, constants[1])):
        odds = _scores(anchor, candidates, temperature) - math.log(constant) - share
        # log h = log sigmoid(odds) and log(1 - h) = log sigmoid(-odds): no overflow at any temperature.
        loss = loss - logsigmoid(odds[:, 0]).mean() - logsigmoid(-odds[:, 1:]).sum(1).mean()
    return loss


def normalizers(
    student: Tensor, teacher: Tensor, students: Tensor, teachers: Tensor, total: int, *, temperature: float = 0.07
) -> tuple[float, float]:
    """Z = N * mean exp(g) of either side as anchors, over a first batch; the authors' code keeps it for the run."""
    sides = ((student, teachers), (teacher, students))
    ours, theirs = (float(_scores(*side, temperature).detach().exp().mean()) * total for side in sides)
    return ours, theirs


def _scores(anchor: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Scores g [B, 1 + K] of each anchor with its candidates."""
    return (candidates @ anchor[:, :, None])[:, :, 0] / temperature


@dataclass
class Memory:
    """The latest embeddings [N, E] of every training row at both sides, to draw candidates from; labels [N]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    @classmethod
    def random(cls, labels: Tensor, width: int, generator: torch.Generator) -> Memory:
        """Directions drawn at random, for rows that nobody has seen yet."""
        shape = (2, len(labels), width)
        student, teacher = unit(torch.randn(shape, generator=generator, device=generator.device))
        return cls(student, teacher, labels)

    def update(self, rows: Tensor, student: Tensor, teacher: Tensor, *, momentum: float = 0.5) -> None:
        """Moves the rows' [B] entries to their new embeddings [B, E]: momentum * old + (1 - momentum) * new."""
        for held, new in ((self.student, student), (self.teacher, teacher)):
            held[rows] = unit(momentum * held[rows] + (1 - momentum) * new.detach())

    def candidates(self, rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Student's and teacher's embeddings [B, 1 + count, E]: of the row itself, then of rows with another label.

        Its own comes from the memory too, as in the authors' code. With the embedding of this step, which the paper's
        formula has, both projections fall into one direction within a few steps, and pull the student after them.
        """
        chosen = torch.cat([rows[:, None], self.others(rows, count, generator)], 1)
        return self.student[chosen], self.teacher[chosen]

    def others(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Row numbers [B, count] with another label than the row's, drawn uniformly with replacement."""
        order = self.labels.argsort(stable=True)
        classes, sizes = torch.unique(self.labels, return_counts=True)
        own = torch.searchsorted(classes, self.labels[rows])
        first, size = (sizes.cumsum(0) - sizes)[own][:, None], sizes[own][:, None]
        if bool((size == len(order)).any()):
            raise ValueError("negatives need a second label")
        # In the order of labels, a row's own class is one stretch: what falls into it or beyond moves past it.
        drawn = torch.rand(len(rows), count, generator=generator, dtype=torch.float64, device=generator.device)
        place = (drawn.to(size.device) * (len(order) - size)).long()
        return order[place + size * (place >= first)]
