"""Losses on feature maps: what pulls a student's inside to its teacher's.

Shapes: student and teacher [B, C, H, W], of one layer each; where it is said, [B, D] as well. Each returns
a scalar, a mean over the batch. What makes shapes agree (a regressor, a crop) is the caller's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.nn.functional import softplus

from fedkd.training.losses.vectors import unit

if TYPE_CHECKING:
    from torch import Tensor

_VARIANCE = 1e-5  # the least variance of `vid`
RAW_VARIANCE = math.log(math.expm1(5.0 - _VARIANCE))  # where `vid` starts: a variance of 5


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean (s - t)^2 over all entries, [B, C, H, W] or [B, D] (FitNets: Romero et al., 2015, without their 1/2)."""
    if student.shape != teacher.shape:
        raise ValueError(f"hint compares equal shapes, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    return (student - teacher).square().mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean (a_s - a_t)^2 of the maps a = mean_c F_c^2 [B, H * W], of length one (AT: Zagoruyko and Komodakis, 2017).

    Any number of channels. The mean over batch and places is the authors' code, to which their weight of 1000
    belongs; their equation 2 has the norm of the difference.
    """
    maps = [unit(features.square().mean(1).flatten(1)) for features in _places(student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of channels, with the kernel (x'y)^2 (NST: Huang and Wang, 2017).

    A channel is its map [H * W], of length one; any number of channels on either side. The teacher's own term,
    a constant, is kept, so that equal channels give zero.
    """
    ours, theirs = (unit(features.flatten(2)) for features in _places(student, teacher))

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT).square().mean()

    return kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)


def vid(mean: Tensor, raw_variance: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ((t - mu)^2 / v + log v) / 2: variational information distillation (Ahn et al., 2019).

    The teacher's features [B, C, H, W] or [B, D] under a Gaussian: ``mean`` of the same shape comes from the student
    by the caller's regressor; v = softplus(``raw_variance`` [C]) + 1e-5 is learned, and starts at `RAW_VARIANCE`.
    """
    if mean.shape != teacher.shape:
        raise ValueError(f"vid compares equal shapes, not {tuple(mean.shape)} and {tuple(teacher.shape)}")
    variance = softplus(raw_variance).add(_VARIANCE).view(-1, *[1] * (mean.dim() - 2))
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


def _places(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both, if they are maps of as many images and places."""
    for features in (student, teacher):
        if features.dim() != 4 or features[:, 0].shape != student[:, 0].shape:
            raise ValueError(f"maps [B, C, H, W] of equal H x W, not {tuple(student.shape)}, {tuple(teacher.shape)}")
    return student, teacher
