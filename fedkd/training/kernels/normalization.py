"""Group normalization for K stacked clients in one kernel, with the shortcut and the ReLU that follow it (Triton).

Like the convolution: bitwise repeatable, each client independent of the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils import _pytree as pytree

from fedkd.training.kernels.convolution import add_parts
from fedkd.training.kernels.tiles import blocks, power_of_two

_RELU = (functional.relu, torch.relu, Tensor.relu)
_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Normalized(Tensor):
    """The result of `group_norm` before it is computed, so that a shortcut and ReLU can be part of the same kernel.

    Networks are written as ever: of such a tensor, a sum with another tensor is such a tensor, and ReLU is computed by
    the kernel. Every other use computes it first. ``compute`` is `group_norm` with its inputs.

    A `torch.autograd.Function` takes it for a tensor without history, so that gradients would end there. They raise an
    error instead.
    """

    @staticmethod
    def __new__(cls, compute: partial[Tensor], shortcut: Tensor | None = None) -> Normalized:
        x = compute.args[0]
        made: Normalized = Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, requires_grad=True
        )
        return made

    def __init__(self, compute: partial[Tensor], shortcut: Tensor | None = None) -> None:
        self._compute, self._shortcut = compute, shortcut
        self._versions = self._current_versions()
        self._value: Tensor | None = None
        with torch._C.DisableTorchFunctionSubclass():
            self.register_hook(_lost)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _RELU and args and args[0]._is_open():
            result = args[0]._computed(relu=True)
            if kwargs.get("inplace"):
                args[0]._value = result
            return result
        if function in _ADD and len(args) == 2 and not kwargs:
            this, other = args if isinstance(args[0], Normalized) else args[::-1]
            if this._is_open() and this._takes(other):
                return Normalized(this._compute, computed(other))
        args, kwargs = computed((args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{function} of a normalization that is not computed")  # it has no memory

    def _is_open(self) -> bool:
        """Whether what follows can be computed with it, and has a gradient."""
        return self._value is None and torch.is_grad_enabled()

    def _takes(self, other: Any) -> bool:
        """Whether it can be its shortcut."""
        x = self._compute.args[0]
        is_alike = isinstance(other, Tensor) and (other.shape, other.dtype) == (x.shape, x.dtype)
        return is_alike and self._shortcut is None

    def _computed(self, relu: bool = False) -> Tensor:
        """What it stands for, or ReLU of it."""
        if self._value is not None:
            return self._value
        if self._versions != self._current_versions():
            raise RuntimeError("what a normalization is computed from, or was added to it, was changed in place")
        with torch.enable_grad():
            value = self._compute(shortcut=self._shortcut, relu=relu)
        if not relu:
            self._value = value
        return value

    def _current_versions(self) -> list[int]:
        return [each._version for each in (*self._compute.args, self._shortcut) if isinstance(each, Tensor)]


def _lost(gradient: Tensor) -> None:
    raise RuntimeError("the gradient of a normalization ends in a torch.autograd.Function")


def computed(output: Any) -> Any:
    """The output of a network, with all its tensors computed."""
    return pytree.tree_map_only(Normalized, Normalized._computed, output)


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
    x = x.contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    return _Normalization.apply(x, weight, bias, shortcut, groups, epsilon, relu)  # type: ignore[no-any-return]


class _Normalization(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        groups: int,
        epsilon: float,
        relu: bool,
    ) -> Tensor:
        y, means, scales = run_group_norm(x, weight, bias, shortcut, groups, epsilon, relu)
        ctx.has_shortcut = shortcut is not None
        # Without ReLU the next layer may work in place.
        ctx.save_for_backward(x, y if relu else None, weight, means, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, means, scales = ctx.saved_tensors
        inputs = gradient, x, y, weight, means, scales
        of_x, of_shortcut, of_parameters = run_gradient(*inputs, shortcut=ctx.has_shortcut and y is not None)
        of_shortcut = None if not ctx.has_shortcut else gradient if y is None else of_shortcut
        return of_x, *of_parameters.unbind(), of_shortcut, None, None, None


def run_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, groups: int, epsilon: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, means and reciprocal standard deviations [K*B, groups]."""
    from fedkd.training.kernels import triton_normalization

    y = torch.empty_like(x, memory_format=torch.channels_last)
    means, scales = (torch.empty((len(x), groups), dtype=torch.float32, device=x.device) for _ in range(2))
    grid, options, warps = _options(x, groups)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_normalization.group_norm[grid](
            x,
            weight.contiguous(),
            bias.contiguous(),
            shortcut,
            y,
            means,
            scales,
            len(x) // len(weight),
            epsilon,
            relu,
            *options,
            num_warps=warps,
        )
    return y, means, scales


def run_gradient(
    gradient: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, means: Tensor, scales: Tensor, shortcut: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x, of the shortcut if asked for, and of weight and bias [2, K, C].

    y is the result if it is one of ReLU.
    """
    from fedkd.training.kernels import triton_normalization

    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    of_shortcut = torch.empty_like(of_x) if shortcut else None
    of_parameters = torch.empty((2, len(weight), x.shape[1]), dtype=torch.float32, device=x.device)
    images = len(x) // len(weight)
    parts = torch.empty((2, len(x), x.shape[1]), dtype=torch.float32, device=x.device)
    grid, options, warps = _options(x, means.shape[1])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_normalization.group_norm_gradient[grid](
            gradient.contiguous(memory_format=torch.channels_last),
            x,
            y,
            weight.contiguous(),
            means,
            scales,
            of_x,
            of_shortcut,
            parts,
            images,
            *options,
            num_warps=warps,
        )
    add_parts(parts.view(-1, images, x.shape[1]), of_parameters)
    return of_x, of_shortcut, of_parameters


def _options(x: Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """The grid, the last arguments of both kernels, and the number of warps.

    A block is whole groups of one image. Where all their positions fit into registers, they are read once.
    """
    images, channels, height, width = x.shape
    size, positions = channels // groups, power_of_two(height * width)
    sector = 32 // x.element_size()  # memory is read in sectors of 32 bytes
    block_channels = power_of_two(max(size, min(channels, max(sector, min(64, 8192 // positions)))))
    fits = positions * block_channels <= 16384
    block_positions = positions if fits else max(1, 4096 // block_channels)
    warps = 16 if fits and positions * block_channels > 8192 else 8
    return (
        (images, blocks(groups, block_channels // size)),
        (channels, groups, height * width, block_positions, block_channels),
        warps,
    )
