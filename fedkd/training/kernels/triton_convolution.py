"""The Triton kernels of `fedkd.training.kernels.convolution`, which imports this file at its first use.

A convolution is the product of a matrix of patches [positions, elements] and the weights [elements, output channels].
A *position* (image, row, column) is one of the result. An *element* of the kernel is the number
``(row * kernel_width + column) * channels + input channel``. No patches are stored: a block of the matrix is gathered
from the images where it is needed. All sizes except the number of images are known when a kernel is compiled.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_product(total, a, b, precision: tl.constexpr):
    if _INTERPRETED:  # the interpreter takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=precision)


@triton.jit
def _place(position, out_height: tl.constexpr, out_width: tl.constexpr):
    """The image, row and column of a position."""
    return position // (out_height * out_width), position // out_width % out_height, position % out_width


@triton.jit
def _source(position, offset, size: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr):
    """The row (or column) of the input at an offset in the kernel, and whether there is one."""
    source = position * stride + offset - padding
    return source, (source >= 0) & (source < size)


@triton.jit
def _patches(
    x,
    images,
    position,
    element,
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride_height: tl.constexpr,
    stride_width: tl.constexpr,
    padding_height: tl.constexpr,
    padding_width: tl.constexpr,
):
    """A block [positions, kernel elements] of one client's matrix of patches."""
    image, row, column = _place(position, out_height, out_width)
    tap, channel = element // channels, element % channels
    h, h_exists = _source(row[:, None], (tap // kernel_width)[None, :], height, stride_height, padding_height)
    w, w_exists = _source(column[:, None], (tap % kernel_width)[None, :], width, stride_width, padding_width)
    exists = h_exists & w_exists & (image < images)[:, None] & (tap < kernel_height * kernel_width)[None, :]
    first = (tl.program_id(2) * images + image).to(tl.int64) * (height * width * channels)
    return tl.load(x + first[:, None] + ((h * width + w) * channels + channel[None, :]), mask=exists, other=0.0)


@triton.jit(do_not_specialize=["images"])
def convolve(
    x,
    weight,
    bias,
    y,
    images,
    weight_first,
    weight_client,
    weight_out,
    weight_in,
    weight_row,
    weight_column,
    outputs: tl.constexpr,
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride_height: tl.constexpr,
    stride_width: tl.constexpr,
    padding_height: tl.constexpr,
    padding_width: tl.constexpr,
    y_image: tl.constexpr,
    y_row: tl.constexpr,
    y_column: tl.constexpr,
    precision: tl.constexpr,
    block_positions: tl.constexpr,
    block_elements: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """The convolution [K, images, out_height, out_width, outputs] of x [K, images, height, width, channels].

    The weights have any strides, also negative ones, and begin at ``weight_first``. So have images, rows and columns of
    y; its channels are adjacent.
    """
    client = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * block_positions + tl.arange(0, block_positions)
    output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    total = tl.zeros((block_positions, block_outputs), tl.float32)
    for start in range(0, kernel_height * kernel_width * channels, block_elements):
        element = start + tl.arange(0, block_elements)
        patches = _patches(
            x, images, position, element, channels, height, width, out_height, out_width, kernel_height, kernel_width,
            stride_height, stride_width, padding_height, padding_width,
        )  # fmt: skip
        tap, channel = element // channels, element % channels
        place = (
            weight_first
            + channel * weight_in
            + (tap // kernel_width) * weight_row
            + (tap % kernel_width) * weight_column
        )
        filters = tl.load(
            weight + client * weight_client + place[:, None] + (output * weight_out)[None, :],
            mask=(tap < kernel_height * kernel_width)[:, None] & (output < outputs)[None, :],
            other=0.0,
        )
        total = _add_product(total, patches, filters.to(patches.dtype), precision)
    if bias is not None:
        total += tl.load(bias + client * outputs + output, mask=output < outputs, other=0.0)[None, :]
    image, row, column = _place(position, out_height, out_width)
    place = (client * images + image) * y_image + row * y_row + column * y_column
    tl.store(
        y + place[:, None] + output[None, :],
        total.to(y.dtype.element_ty),
        mask=(image < images)[:, None] & (output < outputs)[None, :],
    )


@triton.jit(do_not_specialize=["images", "span"])
def weight_gradient(
    x,
    gradient,
    parts,
    images,
    span,
    outputs: tl.constexpr,
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride_height: tl.constexpr,
    stride_width: tl.constexpr,
    padding_height: tl.constexpr,
    padding_width: tl.constexpr,
    precision: tl.constexpr,
    block_positions: tl.constexpr,
    block_elements: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """Partial sums [K, parts, kernel elements, outputs] over ``span`` positions each.

    A program reads a block of the gradient once for as many elements of the kernel as its block has.
    """
    elements: tl.constexpr = kernel_height * kernel_width * channels
    blocks: tl.constexpr = (outputs + block_outputs - 1) // block_outputs
    client = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    element = tl.program_id(0) // blocks * block_elements + tl.arange(0, block_elements)
    output = tl.program_id(0) % blocks * block_outputs + tl.arange(0, block_outputs)
    count = images * (out_height * out_width)
    total = tl.zeros((block_elements, block_outputs), tl.float32)
    for start in range(part * span, min((part + 1) * span, count), block_positions):
        position = start + tl.arange(0, block_positions)
        patches = _patches(
            x, images, position, element, channels, height, width, out_height, out_width, kernel_height, kernel_width,
            stride_height, stride_width, padding_height, padding_width,
        )  # fmt: skip
        values = tl.load(
            gradient + ((client * count + position) * outputs)[:, None] + output[None, :],
            mask=(position < count)[:, None] & (output < outputs)[None, :],
            other=0.0,
        )
        total = _add_product(total, tl.trans(patches), values, precision)
    first = (client * tl.num_programs(1) + part) * (elements * outputs)
    tl.store(
        parts + first + element[:, None] * outputs + output[None, :],
        total,
        mask=(element < elements)[:, None] & (output < outputs)[None, :],
    )


@triton.jit(do_not_specialize=["count"])
def add_parts(parts, result, count, size, block_parts: tl.constexpr, block: tl.constexpr):
    """The sums [K, size] of parts [K, count, size], always added in the same order."""
    client = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((block_parts, block), tl.float32)
    for start in range(0, count, block_parts):
        part = start + tl.arange(0, block_parts)
        exists = (part < count)[:, None] & (place < size)[None, :]
        total += tl.load(parts + (client * count + part)[:, None] * size + place[None, :], mask=exists, other=0.0)
    tl.store(result + client * size + place, tl.sum(total, 0), mask=place < size)
