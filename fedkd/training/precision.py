"""The precision in which networks are trained and predict. Everything else is IEEE float32, or float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedkd.core.errors import UsageError

#: IEEE float32; with products in TF32; or with products and activations in bfloat16. Weights, optimizer state, sums
#: and logits are float32. On a CPU, and for networks in float64, products have the type of the weights.
Precision = Literal["float32", "tf32", "bfloat16"]


def resolve(name: Literal["auto"] | Precision, device: str) -> Precision:
    """The precision on a device; ``auto`` is tf32 on a GPU that has it, and float32 elsewhere.

    Raises:
        UsageError: the device has only float32.

    """
    has_all = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "tf32" if has_all else "float32"
    if name != "float32" and not has_all:
        raise UsageError(
            f"--precision {name} cannot be used on {device}: it needs an NVIDIA GPU of 2020 or later (compute "
            "capability 8.0); use float32 or auto."
        )
    return name


@contextmanager
def computing(precision: Precision) -> Iterator[None]:
    """Let PyTorch's products of float32 on a GPU have the precision while the block runs."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    try:
        for each in settings:
            each.allow_tf32 = precision != "float32"
        yield
    finally:
        for each, allowed in zip(settings, before, strict=True):
            each.allow_tf32 = allowed


def output_of(model: nn.Module, x: Tensor, precision: Precision) -> Any:
    """What a model returns, in float32."""
    if precision != "bfloat16":
        return model(x)
    # Without the cache of cast weights: it must not outlive a step, also not in a recorded one.
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
        outputs = model(x)
    return pytree.tree_map_only(Tensor, lambda each: each.float() if each.dtype == torch.bfloat16 else each, outputs)
