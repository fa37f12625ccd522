"""How much a program of a kernel computes; for convolutions, tables by the shape of a layer.

These are never measured while a model is trained, since results would differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How much a program of a kernel computes: blocks of a product, powers of two from 16."""

    positions: int
    elements: int
    outputs: int
    warps: int
    stages: int
    span: int = 0  # only of a weight gradient: the positions of one partial sum, a multiple of `positions`


def power_of_two(count: int) -> int:
    """The smallest one that is not less."""
    return 1 << (count - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-count // size)


def _block(count: int, largest: int) -> int:
    """The smallest power of two from 16 that holds so many, and at most the largest."""
    return min(largest, max(16, power_of_two(count)))


# Measured on an H200 for 20 clients with 32 images each: `python -m fedkd.bench.kernels --sweep`. One rule for all
# layers of resnet8, resnet20 and cnn takes little longer than the fastest tile of each of them.
def convolution_tile(
    channels: int, outputs: int, kernel: Sequence[int], dtype: torch.dtype, precision: str, is_gradient: bool
) -> Tile:
    """The tile of a convolution with so many input and output channels; of an input gradient they are exchanged."""
    elements = channels * kernel[0] * kernel[1]
    if dtype == torch.float32 and precision == "ieee":  # without tensor cores; larger blocks are slow to compile
        return Tile(64, 16, _block(outputs, 32), 4, 1)
    block = _block(elements, 32), _block(outputs, 64)
    if dtype == torch.bfloat16:
        return Tile(256, *block, 8, 1)
    return Tile(128, *block, 4, 3) if is_gradient else Tile(256, *block, 8, 2)


def weight_gradient_tile(
    channels: int, outputs: int, kernel: Sequence[int], dtype: torch.dtype, precision: str
) -> Tile:
    """The tile of a weight gradient."""
    elements = channels * kernel[0] * kernel[1]
    # Each partial sum is as large as the weights.
    span = 4096 if elements * outputs > 2**16 else 1024 if dtype == torch.bfloat16 else 512
    if dtype == torch.float32 and precision == "ieee":
        return Tile(16, _block(elements, 64), _block(outputs, 32), 4, 1, span)
    if dtype == torch.float32:
        # Instructions of four warps read float32 from shared memory only if the sum runs along its rows. Patches and
        # gradients would be transposed into it, and the stores of eight threads go to the same bank, one after the
        # other; two warps read them as they are loaded. Chosen by the compiled code, not measured yet.
        return Tile(32, _block(elements, 64 if outputs <= 32 else 32), _block(outputs, 64), 2, 1, span)
    return Tile(64, _block(elements, 64), _block(outputs, 64), 4, 2, span)
