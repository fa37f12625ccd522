"""Models that read an image as a sequence: a small transformer over patches, a recurrent network over rows."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

HEAD = 32  # width of an attention head


class ViT(nn.Module):
    """A pre-norm vision transformer (Dosovitskiy et al., 2021; Xiong et al., 2020).

    Positions are the fixed sines of Vaswani et al. (2017) along both axes, so that any image that patches tile can be
    read. The classifier sees the mean of the tokens.
    """

    def __init__(self, classes: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        if width % HEAD:
            raise ValueError(f"width must be a multiple of {HEAD}")
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Attending(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        _, width, rows, columns = patches.shape
        positions = _positions_on_gpu if x.is_cuda else _positions
        tokens = patches.flatten(2).mT + positions(width, rows, columns, x.device)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class Attending(nn.Module):
    """One block: self-attention, then a two-layer perceptron, each added to its input [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, width // HEAD, batch_first=True)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before_attention(x)
        x = x + self.attention(seen, seen, seen, need_weights=False)[0]
        total: Tensor = x + self.mlp(self.before_mlp(x))
        return total


def _positions(width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Sines and cosines [rows * columns, width]: half of the channels for the row, half for the column."""
    rates = torch.exp(torch.arange(width // 4) * (-math.log(10_000.0) / (width // 4)))
    vertical, horizontal = (torch.arange(n)[:, None] * rates for n in (rows, columns))
    waves = [torch.cat([angles.sin(), angles.cos()], -1) for angles in (vertical, horizontal)]
    return (
        torch.cat([waves[0][:, None].expand(rows, columns, -1), waves[1][None].expand(rows, columns, -1)], -1)
        .reshape(rows * columns, -1)
        .to(device)
    )


_positions_on_gpu = lru_cache(_positions)  # a copy for every batch would wait for the GPU


class RowGRU(nn.Module):
    """A bidirectional GRU over the rows of an image; the classifier sees the last state of each direction."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.read = nn.GRU(3 * ROW, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != ROW:
            x = nn.functional.adaptive_avg_pool2d(x, ROW)
        _, last = self.read(x.permute(0, 2, 3, 1).flatten(2))
        logits: Tensor = self.head(last.transpose(0, 1).flatten(1))
        return logits


ROW = 32  # pixels per row; images of other sizes are scaled to it
