"""Augmentation of a batch: a random crop, and a flip if the data set allows it."""

from __future__ import annotations

import torch
from torch import Tensor

PAD = 4  # pixels on each side, the usual crop for CIFAR (He et al., 2016)


def crop_and_flip(pixels: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image [B, H, W, C] shifted by up to `PAD` pixels, with black borders, and mirrored with probability 1/2."""
    return apply(pixels, draw([len(pixels)], flip, generator).to(pixels.device))


def draw(sizes: list[int], flip: bool, generator: torch.Generator) -> Tensor:
    """What happens to the images of batches of these sizes [3, N]: rows and columns to shift by, and whether mirrored.

    Drawn on the CPU, so that the numbers are the same on every device; batch by batch, as a training loop needs them.
    """
    draws = torch.zeros(3, sum(sizes), dtype=torch.int64)
    for shift, mirrored in zip(torch.split(draws[:2], sizes, 1), torch.split(draws[2], sizes), strict=True):
        shift.random_(2 * PAD + 1, generator=generator)
        if flip:
            mirrored.random_(2, generator=generator)
    return draws


def unchanged(count: int) -> Tensor:
    """The draws [3, count] after which `apply` returns the images as they are."""
    return torch.tensor([[PAD], [PAD], [0]]).expand(3, count)


def apply(pixels: Tensor, draws: Tensor) -> Tensor:
    """The images [B, H, W, C] after what was drawn for them [3, B]: one gather for the whole batch."""
    count, height, width, channels = pixels.shape
    down, right, mirrored = draws[..., None]
    rows = torch.arange(height, device=pixels.device) + down
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(mirrored > 0, columns.flip(0), columns) + right
    wide = width + 2 * PAD
    padded = torch.nn.functional.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))
    places = rows[:, :, None] * wide + columns[:, None, :]
    places += torch.arange(count, device=pixels.device)[:, None, None] * ((height + 2 * PAD) * wide)
    return padded.reshape(-1, channels)[places.flatten()].view(count, height, width, channels)
