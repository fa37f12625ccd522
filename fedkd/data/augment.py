"""Augmentation of a batch: a random crop, and a flip if the data set allows it."""

from __future__ import annotations

import torch
from torch import Tensor

PAD = 4  # pixels on each side, the usual crop for CIFAR (He et al., 2016)


def crop_and_flip(pixels: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image [B, H, W, C] shifted by up to `PAD` pixels, with black borders, and mirrored with probability 1/2.

    One gather for the whole batch. Random numbers are drawn on the CPU, so that they are the same on every device.
    """
    count, height, width, channels = pixels.shape
    shift = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator)
    rows = torch.arange(height) + shift[0]
    columns = torch.arange(width).expand(count, width)
    if flip:
        mirrored = torch.randint(2, (count, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    columns = columns + shift[1]
    wide = width + 2 * PAD
    padded = torch.nn.functional.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))
    places = rows[:, :, None] * wide + columns[:, None, :]
    places += torch.arange(count)[:, None, None] * ((height + 2 * PAD) * wide)
    flat = padded.reshape(-1, channels)
    return flat[places.flatten().to(pixels.device)].view(count, height, width, channels)
