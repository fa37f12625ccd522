"""Losses between relations of the samples in a batch, at student and teacher.

Shapes: student and teacher [B, ...], flattened to [B, D]; D may differ. Each returns a scalar. Samples of a batch are
compared with each other, so a batch of one gives zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.nn.functional import smooth_l1_loss

from fedkd.core.lazy import torch
from fedkd.training.losses.vectors import length, unit

if TYPE_CHECKING:
    from torch import Tensor


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """The sum distance * L_D + angle * L_A: relational knowledge distillation (Park et al., 2019).

    L_D is the Huber loss of the distances of pairs, divided by their mean over pairs of different samples; L_A is that
    of the cosines of the angles in triples. Both are means over all pairs and triples, as in the authors' code. Rows
    that coincide have distance and cosines zero. Needs memory for B * B * (B + D) numbers.
    """
    distances, cosines = zip(*map(_distances_and_cosines, (student, teacher)), strict=True)
    return distance * smooth_l1_loss(*distances) + angle * smooth_l1_loss(*cosines)


def _distances_and_cosines(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, B] with mean one, and cosines [B, B, B] of the angles at the first index."""
    flat = features.flatten(1)
    sides = flat[None] - flat[:, None]
    distances, directions = length(sides), unit(sides)
    mean = distances.sum() / max(len(flat) * (len(flat) - 1), 1)
    return distances / torch.where(mean > 0, mean, 1.0), directions @ directions.mT


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_s - G_t|^2 / B^2, where G = F F' with rows of length one (SP: Tung and Mori, 2019)."""
    ours, theirs = (unit(flat @ flat.mT) for flat in (student.flatten(1), teacher.flatten(1)))
    return (ours - theirs).square().mean()


def correlation(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """|K_s - K_t|^2 / B^2 of Gaussian kernels: correlation congruence (CC: Peng et al., 2019).

    The kernel is exp(-gamma |x - y|^2) of features of length one, as its Taylor series to the power ``order`` of x'y.
    RepDistiller's variant is another one: it compares products of neighbors in the batch, so it depends on their
    order, and its weight of 0.02 does not apply here.
    """

    def kernel(features: Tensor) -> Tensor:
        rows = unit(features.flatten(1))
        cosines = rows @ rows.mT
        powers = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(powers).sum(0)

    return (kernel(student) - kernel(teacher)).square().mean()


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of p_ij log(p_ij / q_ij): probabilistic knowledge transfer (PKT: Passalis and Tefas, 2018).

    p (the teacher's) and q [B, B] are the cosines, mapped to [0, 1], with rows that sum to one. The diagonal is
    included and the sum is a mean, as in the authors' code, for which the usual weight is 30000.
    """

    def probs(features: Tensor) -> Tensor:
        rows = unit(features.flatten(1))
        near = (rows @ rows.mT + 1) / 2
        return (near / near.sum(-1, keepdim=True)).clamp_min(1e-30)

    ours, theirs = probs(student), probs(teacher)
    return (theirs * (theirs.log() - ours.log())).mean()
