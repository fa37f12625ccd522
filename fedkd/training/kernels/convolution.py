"""Convolution for K stacked clients, each with its own weights, in one kernel (Triton; on a GPU).

Results are bitwise repeatable, and a client's do not depend on the other clients: sizes of blocks are functions of a
layer's shape and type, and partial sums are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedkd.training.kernels import is_available
from fedkd.training.kernels.tiles import Tile, blocks, convolution_tile, weight_gradient_tile

Precision = Literal["ieee", "tf32"]


def covers(x: Tensor, groups: int, dilation: tuple[int, int]) -> bool:
    """Whether ``conv2d`` computes such a convolution of x; if not, use PyTorch's with groups."""
    return groups == 1 and dilation == (1, 1) and is_available(x)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    precision: Precision,
) -> Tensor:
    """The convolution [K*B, O, H', W'] of x [K*B, C, H, W] with each client's weight [K, O, C, h, w] and bias [K, O].

    x is float32 or bfloat16, which is also the type of the result; both are in channels_last memory. Weights, their
    gradients and all sums are float32; ``precision`` is that of products of float32. Weights may have any strides.
    The fastest are those of ``taps_first``, which the gradient has.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return _Convolution.apply(x, weight, bias, stride, padding, precision)  # type: ignore[no-any-return]


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The convolution of each client: x [K * B, C, H, W], weight [K, O, C / groups, h, w], bias [K, O].

    One convolution of PyTorch, whose channels are those of all clients: for what ``conv2d`` does not cover.
    """
    count = len(weight)
    channels = x.view(count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    bias = None if bias is None else bias.flatten().to(x)
    y = functional.conv2d(channels, weight.flatten(0, 1).to(x), bias, stride, padding, dilation, count * groups)
    return y.view(len(y), count, -1, *y.shape[2:]).transpose(0, 1).flatten(0, 1)


def taps_first(weight: Tensor) -> Tensor:
    """The weight [K, O, C, h, w], in memory [K, h, w, C, O]."""
    return weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        precision: Precision,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, precision
        tile = convolution_tile(weight.shape[2], weight.shape[1], weight.shape[3:], x.dtype, precision, False)
        return run_convolution(x, weight, bias, stride, padding, precision, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        clients, outputs, channels, *kernel = weight.shape
        stride, padding, precision = ctx.options
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            tile = convolution_tile(outputs, channels, kernel, x.dtype, precision, True)
            of_x = run_input_gradient(gradient, weight, x.shape[2:], stride, padding, precision, tile)
        if ctx.needs_input_grad[1]:
            tile = weight_gradient_tile(channels, outputs, kernel, x.dtype, precision)
            of_weight = run_weight_gradient(x, gradient, clients, kernel, stride, padding, precision, tile)
        if ctx.needs_input_grad[2]:
            # A bias is the weight of a constant input. In a sum of PyTorch the order may depend on the number of
            # clients.
            ones = _images(gradient, 1, gradient.shape[2:]).fill_(1)
            tile = weight_gradient_tile(1, outputs, (1, 1), x.dtype, "ieee")
            of_bias = run_weight_gradient(ones, gradient, clients, (1, 1), (1, 1), (0, 0), "ieee", tile).flatten(1)
        return of_x, of_weight, of_bias, None, None, None


def _images(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


# Images of the functions below are in channels_last memory.
def run_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    precision: str,
    tile: Tile,
) -> Tensor:
    """The convolution."""
    sizes = zip(x.shape[2:], weight.shape[3:], stride, padding, strict=True)
    y = _images(x, weight.shape[1], [(size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes])
    _convolve(x, weight, bias, y, stride, padding, precision, tile)
    return y


def run_input_gradient(
    gradient: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    precision: str,
    tile: Tile,
) -> Tensor:
    """The gradient with respect to an input of this size (H, W).

    A row (or column) of the input meets some rows of the kernel, the same as every row at a distance of the stride. So
    these rows are a convolution without a stride, by a part of the kernel in reverse.
    """
    weight = weight.transpose(1, 2)
    y = _images(gradient, weight.shape[1], size)
    if any(step > length for step, length in zip(stride, weight.shape[3:], strict=True)):
        y.zero_()  # there are rows without any
    for first in product(*map(range, stride)):
        ends = [divmod(f + pad, step) for f, pad, step in zip(first, padding, stride, strict=True)]
        (rows, kernel_rows), (columns, kernel_columns) = (
            (slice(start, None, step), slice(left, None, step))
            for start, (_, left), step in zip(first, ends, stride, strict=True)
        )
        part, taps = y[..., rows, columns], weight[..., kernel_rows, kernel_columns]
        if part.numel() and taps.numel():
            pads = [length - 1 - end for length, (end, _) in zip(taps.shape[3:], ends, strict=True)]
            _convolve(gradient, taps, None, part, (1, 1), pads, precision, tile, reverse=True)
    return y


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    precision: str,
    tile: Tile,
    *,
    reverse: bool = False,
) -> None:
    """Write the convolution of x into y; with ``reverse`` by the weight with its rows and columns in reverse."""
    from fedkd.training.kernels import triton_convolution

    clients, outputs, _, *kernel = weight.shape
    images, strides, first = len(x) // clients, list(weight.stride()), 0
    if reverse:
        first = sum((length - 1) * step for length, step in zip(kernel, strides[3:], strict=True))
        strides[3:] = [-step for step in strides[3:]]
    grid = (blocks(images * y[0, 0].numel(), tile.positions), blocks(outputs, tile.outputs), clients)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_convolution.convolve[grid](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            y,
            images,
            first,
            *strides,
            outputs,
            *_shape(x, y, kernel, stride, padding),
            y.stride(0),
            *y.stride()[2:],
            **_options(tile, x.dtype, precision),
        )


def run_weight_gradient(
    x: Tensor,
    gradient: Tensor,
    clients: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    precision: str,
    tile: Tile,
) -> Tensor:
    """The gradient [K, O, C, h, w] with respect to the weight, of which ``kernel`` is (h, w)."""
    from fedkd.training.kernels import triton_convolution

    memory = torch.empty((clients, *kernel, x.shape[1], gradient.shape[1]), dtype=torch.float32, device=x.device)
    result = memory.permute(0, 4, 3, 1, 2)  # as `taps_first`
    outputs, size = gradient.shape[1], result[0].numel()
    images = len(x) // clients
    count = blocks(images * gradient[0, 0].numel(), tile.span)
    parts = result if count == 1 else x.new_empty((clients, count, size), dtype=torch.float32)
    products = blocks(size // outputs, tile.elements) * blocks(outputs, tile.outputs)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_convolution.weight_gradient[products, count, clients](
            x,
            gradient,
            parts,
            images,
            tile.span,
            outputs,
            *_shape(x, gradient, kernel, stride, padding),
            **_options(tile, x.dtype, precision),
        )
    if count > 1:
        add_parts(parts, result)
    return result


def add_parts(parts: Tensor, result: Tensor) -> None:
    """Write the sums of parts [K, count, ...] into the memory of the result, which has K times their size."""
    from fedkd.training.kernels import triton_convolution

    clients, count = parts.shape[:2]
    size = parts[0, 0].numel()
    with torch.cuda.device_of(parts):  # type: ignore[no-untyped-call]
        triton_convolution.add_parts[blocks(size, 64), clients](parts, result, count, size, 16, 64)


def _shape(
    x: Tensor, y: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    return (*x.shape[1:], *y.shape[2:], *kernel, *stride, *padding)


def _options(tile: Tile, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    return {
        "precision": precision if dtype == torch.float32 else "ieee",
        "block_positions": tile.positions,
        "block_elements": tile.elements,
        "block_outputs": tile.outputs,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
