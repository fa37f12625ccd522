"""Group normalization for K stacked clients in one kernel, with the shortcut and the ReLU that follow it (Triton).

Like the convolution in ``kernels``: an operator of PyTorch, bitwise repeatable, each client independent of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkd.training.kernels import add_parts


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    epsilon: float = 1e-5,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The normalized x [K*B, C, H, W], with each client's weight and bias [K, C], plus the shortcut; then ReLU.

    x and the shortcut are float32 or bfloat16, in channels_last memory, and so is the result; what is between them is
    float32. ``kernels.is_available(x)`` says whether it can be computed.
    """
    y: Tensor = _group_norm(x, weight, bias, shortcut, groups, epsilon, relu)[0]
    return y


@torch.library.custom_op("fedkd::group_norm", mutates_args=())
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, groups: int, epsilon: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, means and reciprocal standard deviations [K*B, groups]."""
    from fedkd.training import triton_kernels

    y, means, scales = _empty(x, groups)
    grid, options = _options(x, groups)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_kernels.group_norm[grid](
            _channels_last(x),
            weight.contiguous(),
            bias.contiguous(),
            None if shortcut is None else _channels_last(shortcut),
            y,
            means,
            scales,
            len(x) // len(weight),
            epsilon,
            relu,
            *options,
            num_warps=8,
        )
    return y, means, scales


@_group_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, groups: int, epsilon: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, groups)


@torch.library.custom_op("fedkd::group_norm_gradient", mutates_args=())
def _gradient(
    gradient: Tensor, x: Tensor, y: Tensor, weight: Tensor, means: Tensor, scales: Tensor, relu: bool, shortcut: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the shortcut (without elements if there is none), and of weight and bias [K, 2, C]."""
    from fedkd.training import triton_kernels

    of_x, of_shortcut, of_parameters = _empty_gradients(x, weight, shortcut)
    images = len(x) // len(weight)
    parts = torch.empty((len(weight), images, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    grid, options = _options(x, means.shape[1])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_kernels.group_norm_gradient[grid](
            _channels_last(gradient),
            _channels_last(x),
            y,
            weight.contiguous(),
            means,
            scales,
            of_x,
            of_shortcut if shortcut else None,
            parts,
            images,
            relu,
            *options,
            num_warps=8,
        )
    add_parts(parts, of_parameters)
    return of_x, of_shortcut, of_parameters


@_gradient.register_fake
def _(
    gradient: Tensor, x: Tensor, y: Tensor, weight: Tensor, means: Tensor, scales: Tensor, relu: bool, shortcut: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, shortcut)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, shortcut, _, _, ctx.relu = inputs
    ctx.has_shortcut = shortcut is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output)


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, y, means, scales = ctx.saved_tensors
    of_x, of_shortcut, of_parameters = _gradient(gradient, x, y, weight, means, scales, ctx.relu, ctx.has_shortcut)
    return of_x, *of_parameters.unbind(1), of_shortcut if ctx.has_shortcut else None, None, None, None


_group_norm.register_autograd(_backward, setup_context=_save)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    means, scales = (torch.empty((len(x), groups), dtype=torch.float32, device=x.device) for _ in range(2))
    return y, means, scales


def _empty_gradients(x: Tensor, weight: Tensor, shortcut: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    of_parameters = torch.empty((len(weight), 2, x.shape[1]), dtype=torch.float32, device=x.device)
    return of_x, torch.empty_like(of_x) if shortcut else x.new_empty(0), of_parameters


def _options(x: Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The grid, and the last arguments of both kernels. A block is whole groups of at most 64 channels, or one."""
    images, channels, height, width = x.shape
    size = channels // groups
    block_channels = 1 << (max(size, min(64, channels)) - 1).bit_length()
    block_positions = max(1, min(4096 // block_channels, 1 << (height * width - 1).bit_length()))
    blocks = -(-groups // (block_channels // size))
    return (images, blocks), (channels, groups, height * width, block_positions, block_channels)
