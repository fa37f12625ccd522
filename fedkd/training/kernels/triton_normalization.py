"""The Triton kernels of `fedkd.training.kernels.normalization`, which imports this file at its first use.

If a block has all positions of an image, each loop is one pass, and Triton reads an image once for all of them: it
drops repeated reads, as long as no results are written between them.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _of_group(values, channels_per_group: tl.constexpr, groups: tl.constexpr):
    """For each channel of a block with so many groups, the sum over the channels of its group."""
    if groups == 1:
        return tl.zeros_like(values) + tl.sum(values, 0)
    group = tl.arange(0, values.shape[0]) // channels_per_group
    return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["images"])
def group_norm(
    x,
    weight,
    bias,
    shortcut,
    y,
    means,
    scales,
    images,
    epsilon: tl.constexpr,
    relu: tl.constexpr,
    channels: tl.constexpr,
    groups: tl.constexpr,
    positions: tl.constexpr,
    block_positions: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Group normalization of x [K, images, positions, channels], plus a shortcut, then ReLU; each of both if given.

    Also means and reciprocal standard deviations [K, images, groups]. A program computes whole groups of one image.
    """
    size: tl.constexpr = channels // groups
    block_groups: tl.constexpr = block_channels // size
    image = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, block_channels)
    channel = tl.program_id(1) * (block_groups * size) + local
    known = (local < block_groups * size) & (channel < channels)
    offset = tl.arange(0, block_positions)[:, None] * channels + channel[None, :]
    first = image * (positions * channels)
    total = tl.zeros((block_positions, block_channels), tl.float32)
    for start in range(0, positions, block_positions):
        exists = (start + tl.arange(0, block_positions) < positions)[:, None] & known[None, :]
        total += tl.load(x + first + start * channels + offset, mask=exists, other=0.0).to(tl.float32)
    mean = _of_group(tl.sum(total, 0), size, block_groups) / (size * positions)
    total = tl.zeros((block_positions, block_channels), tl.float32)
    for start in range(0, positions, block_positions):
        exists = (start + tl.arange(0, block_positions) < positions)[:, None] & known[None, :]
        values = tl.load(x + first + start * channels + offset, mask=exists, other=0.0).to(tl.float32)
        centered = tl.where(exists, values - mean[None, :], 0.0)
        total += centered * centered
    scale = tl.rsqrt(_of_group(tl.sum(total, 0), size, block_groups) / (size * positions) + epsilon)
    parameter = image // images * channels + channel
    factor = scale * tl.load(weight + parameter, mask=known, other=0.0)
    addend = tl.load(bias + parameter, mask=known, other=0.0)
    for start in range(0, positions, block_positions):
        exists = (start + tl.arange(0, block_positions) < positions)[:, None] & known[None, :]
        values = tl.load(x + first + start * channels + offset, mask=exists, other=0.0).to(tl.float32)
        values = (values - mean[None, :]) * factor[None, :] + addend[None, :]
        if shortcut is not None:
            values += tl.load(shortcut + first + start * channels + offset, mask=exists, other=0.0).to(tl.float32)
        if relu:
            values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + first + start * channels + offset, values.to(y.dtype.element_ty), mask=exists)
    place = image * groups + channel // size
    tl.store(means + place, mean, mask=known & (local % size == 0))
    tl.store(scales + place, scale, mask=known & (local % size == 0))


@triton.jit
def _read(gradient, x, y, place, exists, mean, scale):
    """A block of the gradient, after that of ReLU if y is its result, and of the normalized x."""
    values = tl.load(gradient + place, mask=exists, other=0.0).to(tl.float32)
    if y is not None:
        values = tl.where(tl.load(y + place, mask=exists, other=0.0).to(tl.float32) <= 0, 0.0, values)
    return values, (tl.load(x + place, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]


@triton.jit(do_not_specialize=["images"])
def group_norm_gradient(
    gradient,
    x,
    y,
    weight,
    means,
    scales,
    of_x,
    of_shortcut,
    parts,
    images,
    channels: tl.constexpr,
    groups: tl.constexpr,
    positions: tl.constexpr,
    block_positions: tl.constexpr,
    block_channels: tl.constexpr,
):
    """The gradients of ``group_norm``; those of weight and bias as parts [2, K, images, channels].

    y is the result if it is one of ReLU.
    """
    size: tl.constexpr = channels // groups
    block_groups: tl.constexpr = block_channels // size
    image = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, block_channels)
    channel = tl.program_id(1) * (block_groups * size) + local
    known = (local < block_groups * size) & (channel < channels)
    offset = tl.arange(0, block_positions)[:, None] * channels + channel[None, :]
    first = image * (positions * channels)
    mean = tl.load(means + image * groups + channel // size, mask=known, other=0.0)
    scale = tl.load(scales + image * groups + channel // size, mask=known, other=0.0)
    factor = tl.load(weight + image // images * channels + channel, mask=known, other=0.0)
    of_bias = tl.zeros((block_positions, block_channels), tl.float32)
    of_weight = tl.zeros((block_positions, block_channels), tl.float32)
    for start in range(0, positions, block_positions):
        exists = (start + tl.arange(0, block_positions) < positions)[:, None] & known[None, :]
        place = first + start * channels + offset
        values, normalized = _read(gradient, x, y, place, exists, mean, scale)
        of_bias += values
        of_weight += values * normalized
    sum_of_bias, sum_of_weight = tl.sum(of_bias, 0), tl.sum(of_weight, 0)
    shift = _of_group(sum_of_bias * factor, size, block_groups) / (size * positions)
    slope = _of_group(sum_of_weight * factor, size, block_groups) / (size * positions)
    for start in range(0, positions, block_positions):
        exists = (start + tl.arange(0, block_positions) < positions)[:, None] & known[None, :]
        place = first + start * channels + offset
        values, normalized = _read(gradient, x, y, place, exists, mean, scale)
        of_one = (values * factor[None, :] - shift[None, :] - normalized * slope[None, :]) * scale[None, :]
        tl.store(of_x + place, of_one.to(of_x.dtype.element_ty), mask=exists)
        if of_shortcut is not None:
            tl.store(of_shortcut + place, values.to(of_shortcut.dtype.element_ty), mask=exists)
    tl.store(parts + image * channels + channel, sum_of_weight, mask=known)
    tl.store(parts + (tl.num_programs(0) + image) * channels + channel, sum_of_bias, mask=known)
