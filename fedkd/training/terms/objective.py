"""Lesson: a student beside its teachers, and the loss of what they all give for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.algorithms import aggregators
from fedkd.training import layers
from fedkd.training.layers import Seen, Watched
from fedkd.training.terms import Pair, hard
from fedkd.training.terms.modules import Batch

if TYPE_CHECKING:
    from fedkd.training.terms import Term


class Lesson(nn.Module):
    """A student with everything that pulls it. Its parameters are the student's and the terms' adapters'.

    ``sample`` [B, 3, H, W] is some input, ``labels`` [N] are those of all rows that will be trained on.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        terms: Sequence[Term],
        sample: Tensor,
        labels: Tensor,
        votes: str = "equal",
    ) -> None:
        super().__init__()
        seen = layers.shapes(student, sample)
        pair = Pair(seen, tuple(layers.shapes(teacher, sample) for teacher in teachers), labels)
        pulls = [term.build(pair) for term in terms]
        self.pulls = nn.ModuleList(pulls)
        self.hard, self.votes = hard(terms), votes
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

    ``entropy``: by the certainty of its probabilities, as `aggregators.entropy` weighs clients. ``agreement``: CA-MKD's
    (1 - softmax_k(CE_k)) / (K - 1) of its cross-entropy with the label (Zhang et al., 2022).
    """
    count = len(teachers)
    if count < 2 or votes == "equal":
        return torch.full((count, len(labels)), 1 / max(count, 1), device=labels.device)
    answers = torch.stack([seen.logits for seen in teachers])
    if votes == "entropy":
        return aggregators.certainty(answers, torch.ones(count, 1, device=labels.device)).float()
    costs = torch.stack([nn.functional.cross_entropy(logits, labels, reduction="none") for logits in answers])
    return (1 - costs.softmax(0)) / (count - 1)
