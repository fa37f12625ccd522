"""Lengths and directions whose gradients stay finite where there is no direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_SHORT = 1e-24  # the square of a length that counts as zero; dividing by less overflows in float32


def length(vectors: Tensor) -> Tensor:
    """Euclidean lengths [...] of vectors [..., D]; a zero vector gets no gradient, where sqrt's is infinite."""
    square = vectors.square().sum(-1)
    there = square > _SHORT
    return torch.where(there, torch.where(there, square, 1.0).sqrt(), 0.0)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length one; a zero vector stays and gets no gradient, where `normalize` gives it 1e12."""
    size = length(vectors)[..., None]
    return torch.where(size > 0, vectors / torch.where(size > 0, size, 1.0), 0.0)


def standard(values: Tensor) -> Tensor:
    """Values [..., D] with mean zero and length one: products of two of these are Pearson's correlations.

    What is constant up to rounding becomes zeros without a gradient; else noise would be blown up to length one.
    """
    centered = values - values.mean(-1, keepdim=True)
    noise = 16 * torch.finfo(values.dtype).eps * length(values.detach())
    return torch.where((length(centered.detach()) > noise)[..., None], unit(centered), 0.0)
