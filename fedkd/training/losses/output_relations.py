"""Losses between relations of outputs; arguments as in `logits`: student_logits [B, C] / T, teacher_probs [B, C].

A loss of `relations` between softmax(student_logits) and teacher_probs, plus ``kl`` times `logits.kl`. The relation by
itself does not determine the classes, since it does not change when the student's classes are permuted. The weights are
ours: a hundredth of those in public code for features (RepDistiller; for `correlation`, one of similar effect). With
those the relation dominates KL, and a student on digits learned relations but few classes, or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt

from fedkd.training.losses import logits, relations
from fedkd.training.losses.logits import Scale, Weight

if TYPE_CHECKING:
    from torch import Tensor


def rkd(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    distance: Weight = 25.0,
    angle: Weight = 50.0,
    weight: Weight = 0.01,
    kl: Weight = 1.0,
) -> Tensor:
    """Weight * `relations.rkd` (Park et al., 2019) + kl * KL."""
    relation = relations.rkd(student_logits.softmax(-1), teacher_probs, distance=distance, angle=angle)
    return kl * logits.kl(student_logits, teacher_probs) + weight * relation


def similarity(student_logits: Tensor, teacher_probs: Tensor, *, weight: Weight = 30.0, kl: Weight = 1.0) -> Tensor:
    """Weight * `relations.similarity` (SP: Tung and Mori, 2019) + kl * KL."""
    relation = relations.similarity(student_logits.softmax(-1), teacher_probs)
    return kl * logits.kl(student_logits, teacher_probs) + weight * relation


def correlation(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    gamma: Scale = 0.4,
    order: PositiveInt = 2,
    weight: Weight = 3.0,
    kl: Weight = 1.0,
) -> Tensor:
    """Weight * `relations.correlation` (CC: Peng et al., 2019) + kl * KL."""
    relation = relations.correlation(student_logits.softmax(-1), teacher_probs, gamma=gamma, order=order)
    return kl * logits.kl(student_logits, teacher_probs) + weight * relation


def pkt(student_logits: Tensor, teacher_probs: Tensor, *, weight: Weight = 300.0, kl: Weight = 1.0) -> Tensor:
    """Weight * `relations.pkt` (Passalis and Tefas, 2018) + kl * KL."""
    relation = relations.pkt(student_logits.softmax(-1), teacher_probs)
    return kl * logits.kl(student_logits, teacher_probs) + weight * relation
