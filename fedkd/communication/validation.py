"""What the server checks in an update before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.core.tensors import Int64, UInt8

if TYPE_CHECKING:
    from fedkd.algorithms.base import Update
    from fedkd.core.tensors import Shapes

DTYPES = {Int64: "torch.int64", UInt8: "torch.uint8"}
MAX_ABS_LOGIT = 1e6  # larger logits have diverged, and would be infinite when they are divided by T
MAX_ABS_METRIC = 1e30  # so that sums of metrics are finite
SUM_TOLERANCE = 5e-3  # of a distribution: the error that bfloat16 makes in its sum


def validate_update(update: Update, declared: Shapes) -> str:
    """Why the server refuses an update; empty if it does not.

    Names, shapes and dtypes must be those that the algorithm declares, values finite, ``probs`` distributions.
    """
    if set(update.tensors) != set(declared):
        return f"sent {sorted(update.tensors)} instead of {sorted(declared)}"
    if not (update.examples > 0 and all(abs(value) <= MAX_ABS_METRIC for value in update.metrics.values())):
        return "sent no examples, or a metric that is not finite"
    for name, tensor in update.tensors.items():
        if not _fits(tuple(tensor.shape), declared[name]):
            return f"sent {name} of shape {tuple(tensor.shape)} instead of {declared[name]}"
        dtype = DTYPES.get(type(declared[name]), "torch.float32")
        if str(tensor.dtype) != dtype:
            return f"sent {name} of type {tensor.dtype} instead of {dtype}"
        if not tensor.isfinite().all():
            return f"sent {name} with values that are not finite"
        if name == "logits" and (tensor.abs() > MAX_ABS_LOGIT).any():
            return f"sent logits larger than {MAX_ABS_LOGIT:,.0f}"
        if name == "probs" and not (
            (tensor >= 0).all() and ((tensor.double().sum(-1) - 1).abs() < SUM_TOLERANCE).all()
        ):
            return "sent probs that are not distributions"
    return ""


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape is the declared one, in which -n means at most n."""
    return len(shape) == len(declared) and all(
        extent <= -wanted if wanted < 0 else extent == wanted for extent, wanted in zip(shape, declared, strict=True)
    )
