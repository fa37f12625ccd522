"""Contrastive representation distillation (CRD: Tian et al., 2020).

Embeddings have length one. Scores are g = s't / temperature. As in the authors' code, exp(g) is divided by a
constant Z, so that it approximates a probability over the N training samples.
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
    """-log h(same sample) - sum_k log(1 - h(other sample k)), for both sides; h = x / (x + K / N), x = exp(g) / Z.

    student and teacher [B, E]; candidates of both [B, 1 + K, E], first that of the same sample; ``total`` is N.
    The student is compared with the teacher's candidates, and the teacher with the student's. ``constants`` are Z
    for the student and for the teacher as anchors, see `normalizers`; Z = 1 is the paper's formula. Mean over the
    batch, sum over both sides. A learned projection of the teacher gets gradients as well.
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
    """Z = N * mean exp(g) for student and teacher as anchors; computed on the first batch, as in the authors' code."""
    sides = ((student, teachers), (teacher, students))
    ours, theirs = (float(_scores(*side, temperature).detach().exp().mean()) * total for side in sides)
    return ours, theirs


def _scores(anchor: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Scores g [B, 1 + K] of each anchor with its candidates."""
    return (candidates @ anchor[:, :, None])[:, :, 0] / temperature


@dataclass
class Memory:
    """The latest embeddings [N, E] of all training samples by student and teacher, and their labels [N]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    @classmethod
    def random(cls, labels: Tensor, width: int, generator: torch.Generator) -> Memory:
        """Random directions, as the initial embeddings."""
        shape = (2, len(labels), width)
        student, teacher = unit(torch.randn(shape, generator=generator, device=generator.device))
        return cls(student, teacher, labels)

    def update(self, rows: Tensor, student: Tensor, teacher: Tensor, *, momentum: float = 0.5) -> None:
        """Updates the embeddings of samples ``rows`` [B] by new ones [B, E]: momentum * old + (1 - momentum) * new."""
        for embeddings, new in ((self.student, student), (self.teacher, teacher)):
            embeddings[rows] = unit(momentum * embeddings[rows] + (1 - momentum) * new.detach())

    def candidates(self, rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Student's and teacher's embeddings [B, 1 + count, E]: of the sample, then of samples with another label.

        The sample's own embedding comes from the memory too, as in the authors' code. With the embedding of this
        step, as in the paper's formula, both projections collapse to one direction within a few steps, and so does
        the student.
        """
        chosen = torch.cat([rows[:, None], self.others(rows, count, generator)], 1)
        return self.student[chosen], self.teacher[chosen]

    def others(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Indices [B, count] of samples with another label, drawn uniformly with replacement."""
        order = self.labels.argsort(stable=True)
        classes, sizes = torch.unique(self.labels, return_counts=True)
        own = torch.searchsorted(classes, self.labels[rows])
        first, size = (sizes.cumsum(0) - sizes)[own][:, None], sizes[own][:, None]
        if bool((size == len(order)).any()):
            raise ValueError("negatives need a second label")
        # Sorted by label, the sample's own class is one interval: positions at or after its start are shifted past it.
        drawn = torch.rand(len(rows), count, generator=generator, dtype=torch.float64, device=generator.device)
        place = (drawn.to(size.device) * (len(order) - size)).long()
        return order[place + size * (place >= first)]
