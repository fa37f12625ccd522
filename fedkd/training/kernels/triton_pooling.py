"""The Triton kernels of `fedkd.training.kernels.pooling`, which imports this file at its first use."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _windows(
    x, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):
    """A block of results [rows, columns, channels] of one image: the places, in it and in x, and which of them exist.

    Also the largest value in each window, and its number there: as in PyTorch the first of equal ones, or the last NaN.
    """
    place = tl.program_id(1) * block + tl.arange(0, block)
    row, column = place // (width // size * channels), place // channels % (width // size)
    exists = row < height // size
    source = tl.program_id(0).to(tl.int64) * (height * width * channels)
    source += (row * size * width + column * size) * channels + place % channels
    largest = tl.load(x + source, mask=exists, other=0.0).to(tl.float32)
    chosen = tl.zeros((block,), tl.int32)
    for number in tl.static_range(1, size * size):
        offset = (number // size * width + number % size) * channels
        values = tl.load(x + source + offset, mask=exists, other=0.0).to(tl.float32)
        is_larger = (values > largest) | (values != values)
        largest = tl.where(is_larger, values, largest)
        chosen = tl.where(is_larger, number, chosen)
    return place, source, exists, largest, chosen


@triton.jit
def max_pool(
    x, y, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):
    """The largest values [images, height // size, width // size, channels] of x [images, height, width, channels]."""
    place, _, exists, largest, _ = _windows(x, channels, height, width, size, block)
    first = tl.program_id(0).to(tl.int64) * (height // size * (width // size) * channels)
    tl.store(y + first + place, largest.to(y.dtype.element_ty), mask=exists)


@triton.jit
def max_pool_gradient(
    gradient,
    x,
    of_x,
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """The gradient of ``max_pool``, except where no window is."""
    place, source, exists, _, chosen = _windows(x, channels, height, width, size, block)
    first = tl.program_id(0).to(tl.int64) * (height // size * (width // size) * channels)
    values = tl.load(gradient + first + place, mask=exists, other=0.0)
    for number in tl.static_range(size * size):
        offset = (number // size * width + number % size) * channels
        tl.store(of_x + source + offset, tl.where(chosen == number, values, 0.0), mask=exists)
