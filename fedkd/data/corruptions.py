"""Harder test images: four corruptions at five strengths, and images that are slightly rotated and shifted.

Kinds and constants are those of CIFAR-10-C (Hendrycks & Dietterich, 2019), which are meant for 32 pixels and are not
rescaled for others. Theirs truncates to bytes, ours rounds; the noise is drawn from our seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedkd.core import seeds
from fedkd.core.errors import UsageError, unknown

STRENGTHS = (1, 2, 3, 4, 5)
CHUNK = 512  # images at once: 6 MB as float32 at 32 pixels

NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation, of a range of one
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation, in pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # the fraction that is left
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # pixels per side, as a fraction
ROTATION, SHIFT = 15.0, 2.0  # the largest rotation (degrees) and shift (pixels) of `transformed`; our choice

Change = Callable[[Tensor, float, torch.Generator], Tensor]  # [B, H, W, 3] float32, 0 to 255 -> the same, unrounded


def corrupt(pixels: Tensor, kind: str, strength: int, seed: int) -> Tensor:
    """The images [N, H, W, 3] uint8, corrupted; the same bytes for the same seed.

    The strength scales one draw of noise, so that strengths are compared on the same noise.

    Raises:
        UsageError: an unknown kind or strength.

    """
    if kind not in KINDS:
        raise UsageError(unknown("corruption", kind, KINDS))
    if strength not in STRENGTHS:
        raise UsageError(f"The strength of a corruption is one of 1 to 5, not {strength}.")
    change, constants = KINDS[kind]
    generator = seeds.generator(seed, "corruption", kind)
    return _by_chunks(pixels, lambda part, _: change(part, constants[strength - 1], generator))


def transformed(pixels: Tensor, seed: int, *, rotation: float = ROTATION, shift: float = SHIFT) -> Tensor:
    """Each image [N, H, W, 3] rotated by up to ``rotation`` degrees and shifted by up to ``shift`` pixels on each axis.

    Both are uniform, of either sign, and not rounded. The border is mirrored, so that there are no black corners.
    """
    draws = 2 * torch.rand(len(pixels), 3, generator=seeds.generator(seed, "moved")) - 1
    angles, shifts = draws[:, 0] * math.radians(rotation), draws[:, 1:] * shift
    return _by_chunks(pixels, lambda part, rows: _resample(part, angles[rows], shifts[rows]))


def _by_chunks(pixels: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """``change`` applied to chunks of the images as float32 and their indices, as bytes again; on the CPU."""
    changed = torch.empty_like(pixels)
    for start in range(0, len(pixels), CHUNK):
        rows = slice(start, start + CHUNK)
        changed[rows] = change(pixels[rows].cpu().float(), rows).round_().clamp_(0, 255).to(torch.uint8)
    return changed


def _noise(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return images + 255 * std * torch.randn(images.shape, generator=generator)


def _blur(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """A convolution with a Gaussian that is truncated at four standard deviations; the border pixels are repeated."""
    return _mixed(images, *(_gaussian(size, std) for size in images.shape[1:3]))


def _gaussian(size: int, std: float) -> Tensor:
    """The convolution along one axis as a matrix [size, size]: faster than a sliding kernel at this size."""
    radius = int(4 * std + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / std).square())
    places = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, places, (kernel / kernel.sum()).expand(size, -1))


def _contrast(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Contrast reduced toward the mean of each image and channel."""
    return torch.lerp(images.mean((1, 2), keepdim=True), images, share)


def _pixelate(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each pixel as the mean of those in its cell of a coarser grid: resized down and up again by a box filter."""
    return _mixed(images, *(_cells(size, int(share * size)) for size in images.shape[1:3]))


def _cells(size: int, cells: int) -> Tensor:
    """The matrix [size, size] that puts the mean of a cell in the place of each pixel whose center lies in it."""
    cell = ((torch.arange(size) + 0.5) * (max(1, cells) / size)).long()
    together = (cell[:, None] == cell).float()
    return together / together.sum(1, keepdim=True)


def _mixed(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [B, H, W, 3] whose rows are mixed by a matrix [H, H] and whose columns by one [W, W]."""
    return torch.einsum("ih,nhwc,jw->nijc", rows, images, columns)


def _resample(images: Tensor, angles: Tensor, shifts: Tensor) -> Tensor:
    """Images rotated counterclockwise by ``angles`` [B], then shifted right and down by ``shifts`` [B, 2]; bilinear."""
    height, width = images.shape[1:3]
    cos, sin, (right, down) = angles.cos(), angles.sin(), shifts.T
    # grid_sample needs the source of each pixel, in units of half a side: the inverse of the movement.
    across, along = cos * right - sin * down, sin * right + cos * down
    back = torch.stack(
        [
            torch.stack([cos, -sin * (height / width), -across * (2 / width)], -1),
            torch.stack([sin * (width / height), cos, -along * (2 / height)], -1),
        ],
        1,
    )
    planes = images.permute(0, 3, 1, 2)
    grid = nn.functional.affine_grid(back, list(planes.shape), align_corners=False)
    seen = nn.functional.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return seen.permute(0, 2, 3, 1)


KINDS: dict[str, tuple[Change, tuple[float, ...]]] = {
    "noise": (_noise, NOISE),
    "blur": (_blur, BLUR),
    "contrast": (_contrast, CONTRAST),
    "pixelate": (_pixelate, PIXELATE),
}
