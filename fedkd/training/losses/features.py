"""Losses between feature maps of student and teacher.

Shapes: student and teacher [B, C, H, W], of one layer each; some losses accept [B, D] as well. Each returns a
scalar, a mean over the batch. The caller makes the shapes agree (by a regressor or a crop).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.nn.functional import softplus

from fedkd.training.losses.vectors import unit

if TYPE_CHECKING:
    from torch import Tensor

_VARIANCE = 1e-5  # the smallest variance of `vid`
RAW_VARIANCE = math.log(math.expm1(5.0 - _VARIANCE))  # the initial value of `vid`: a variance of 5


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean (s - t)^2 over all entries, [B, C, H, W] or [B, D] (FitNets: Romero et al., 2015, without their 1/2)."""
    if student.shape != teacher.shape:
        raise ValueError(f"hint compares equal shapes, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    return (student - teacher).square().mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean (a_s - a_t)^2 of the maps a = mean_c F_c^2 [B, H * W], of length one (AT: Zagoruyko and Komodakis, 2017).

    Any number of channels. The mean over batch and positions is that of the authors' code, for which their weight
    is 1000; their equation 2 has the norm of the difference.
    """
    maps = [unit(features.square().mean(1).flatten(1)) for features in _checked_maps(student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of channels, with the kernel (x'y)^2 (NST: Huang and Wang, 2017).

    Each channel is its map [H * W], of length one. Student and teacher may have any number of channels. The teacher's
    own term is a constant; with it, equal channels give zero.
    """
    ours, theirs = (unit(features.flatten(2)) for features in _checked_maps(student, teacher))

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT).square().mean()

    return kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)


def vid(mean: Tensor, raw_variance: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ((t - mu)^2 / v + log v) / 2: variational information distillation (Ahn et al., 2019).

    The negative log-likelihood of the teacher's features [B, C, H, W] or [B, D] under a Gaussian. ``mean`` has the
    same shape and is the caller's regression on the student's features. v = softplus(``raw_variance`` [C]) + 1e-5 is
    learned; `RAW_VARIANCE` is its initial value.
    """
    if mean.shape != teacher.shape:
        raise ValueError(f"vid compares equal shapes, not {tuple(mean.shape)} and {tuple(teacher.shape)}")
    variance = softplus(raw_variance).add(_VARIANCE).view(-1, *[1] * (mean.dim() - 2))
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


def _checked_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps, checked to have the same B, H and W."""
    for features in (student, teacher):
        if features.dim() != 4 or features[:, 0].shape != student[:, 0].shape:
            raise ValueError(f"maps [B, C, H, W] of equal H x W, not {tuple(student.shape)}, {tuple(teacher.shape)}")
    return student, teacher
