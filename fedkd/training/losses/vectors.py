"""Lengths and directions of vectors, with finite gradients at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MIN_SQUARE = 1e-24  # squared lengths up to this count as zero; dividing by less overflows in float32


def length(vectors: Tensor) -> Tensor:
    """Euclidean lengths [...] of vectors [..., D]; a zero vector gets a zero gradient (with sqrt: infinite)."""
    square = vectors.square().sum(-1)
    is_positive = square > _MIN_SQUARE
    return torch.where(is_positive, torch.where(is_positive, square, 1.0).sqrt(), 0.0)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length one; a zero vector stays zero with a zero gradient, where `normalize` gives 1e12."""
    size = length(vectors)[..., None]
    return torch.where(size > 0, vectors / torch.where(size > 0, size, 1.0), 0.0)


def standard(values: Tensor) -> Tensor:
    """Values [..., D] with mean zero and length one: products of two of these are Pearson's correlations.

    Values that are constant up to rounding become zeros without a gradient; else noise would be scaled to length one.
    """
    centered = values - values.mean(-1, keepdim=True)
    noise = 16 * torch.finfo(values.dtype).eps * length(values.detach())
    return torch.where((length(centered.detach()) > noise)[..., None], unit(centered), 0.0)
