"""Max pooling without overlap, in one kernel that keeps no indices (Triton; on a GPU).

PyTorch's kernels for images in channels_last memory write and read eight bytes for each index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from fedkd.training.kernels.tiles import blocks

BLOCK = 1024


def window(layer: nn.MaxPool2d) -> int:
    """The size of the square windows of a layer that `max_pool2d` computes; of others 0.

    The code of a kernel has all places of a window, so larger ones would take long to compile.
    """
    (height, width), stride, padding, dilation = map(
        _pair, (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    is_covered = (height, stride, padding, dilation) == (width, (height, width), (0, 0), (1, 1))
    return height if is_covered and height <= 4 and not layer.ceil_mode and not layer.return_indices else 0


def max_pool2d(x: Tensor, size: int) -> Tensor:
    """The largest values [B, C, H // size, W // size] in windows of x [B, C, H, W], to the bit those of PyTorch.

    x is float32 or bfloat16, in channels_last memory, and so is the result.
    """
    return _Pooling.apply(x.contiguous(memory_format=torch.channels_last), size)  # type: ignore[no-any-return]


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        from fedkd.training.kernels import triton_pooling

        ctx.save_for_backward(x)
        ctx.size = size
        shape = (*x.shape[:2], *(length // size for length in x.shape[2:]))
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            triton_pooling.max_pool[_grid(y)](x, y, *x.shape[1:], size, BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from fedkd.training.kernels import triton_pooling

        (x,), size = ctx.saved_tensors, ctx.size
        of_x = torch.empty_like(x, memory_format=torch.channels_last)
        if any(length % size for length in x.shape[2:]):  # outside of the windows
            of_x.zero_()
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            triton_pooling.max_pool_gradient[_grid(gradient)](gradient, x, of_x, *x.shape[1:], size, BLOCK)
        return of_x, None


def _grid(y: Tensor) -> tuple[int, int]:
    return len(y), blocks(y[0].numel(), BLOCK)
