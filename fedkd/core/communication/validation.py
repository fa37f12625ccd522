"""What the server checks in an update before it is used."""

from __future__ import annotations

from math import isfinite
from statistics import median
from typing import TYPE_CHECKING

from fedkd.core.tensors import Int64, UInt8

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from fedkd.algorithms.base import Update
    from fedkd.core.tensors import Shapes

DTYPES = {Int64: "torch.int64", UInt8: "torch.uint8"}
MAX_ABS_LOGIT = 1e6  # larger logits have diverged, and would be infinite when they are divided by T
MAX_ABS_VALUE = 1e9  # of all other tensors: no weight, statistic or embedding is larger unless training has diverged
MAX_ABS_METRIC = 1e30  # so that sums of metrics are finite
MAX_EXAMPLES = 10**9  # of a client whose number of samples the server does not know
SUM_TOLERANCE = 5e-3  # of a distribution: the error that bfloat16 makes in its sum


def validate_update(
    update: Update, declared: Shapes, metrics: Collection[str] | None = None, most_examples: int = MAX_EXAMPLES
) -> str:
    """Why the server refuses an update; empty if it does not.

    Names, shapes and dtypes must be those that the algorithm declares, values finite and not too large, ``probs``
    distributions; of ``metrics``, if given, no others may be there; examples must be as many as the client can have.
    """
    if difference := names_differ(update.tensors, declared):
        return f"sent {difference}"
    if metrics is not None and (undeclared := set(update.metrics) - set(metrics)):
        return f"sent metrics that are not declared: {few(undeclared)}"
    if not (update.examples > 0 and all(abs(value) <= MAX_ABS_METRIC for value in update.metrics.values())):
        return "sent no examples, or a metric that is not finite"
    if update.examples > most_examples:
        return f"sent a number of examples above {most_examples}, which is all that the client can have"
    return next(filter(None, (_fault(name, tensor, declared[name]) for name, tensor in update.tensors.items())), "")


def names_differ(sent: Collection[str], declared: Collection[str]) -> str:
    """Which declared names are missing, and which others are there; empty if there is no difference."""
    missing, more = set(declared) - set(sent), set(sent) - set(declared)
    return " and ".join(f"{word} {few(names)}" for word, names in (("no", missing), ("undeclared", more)) if names)


def few(names: Collection[str]) -> str:
    """The first three names in order, and how many there are more."""
    first = ", ".join(sorted(names)[:3])
    return first + f" and {len(names) - 3} more" * (len(names) > 3)


def _fault(name: str, tensor: Tensor, declared: tuple[int, ...]) -> str:
    """Why the server refuses a tensor; empty if it does not."""
    if not _fits(tuple(tensor.shape), declared):
        return f"sent {name} of shape {tuple(tensor.shape)} instead of {declared}"
    dtype = DTYPES.get(type(declared), "torch.float32")
    if str(tensor.dtype) != dtype:
        return f"sent {name} of type {tensor.dtype} instead of {dtype}"
    peak = tensor.abs().max().item() if tensor.is_floating_point() and tensor.numel() else 0.0
    if not isfinite(peak):
        return f"sent {name} with values that are not finite"
    limit = MAX_ABS_LOGIT if name == "logits" else MAX_ABS_VALUE
    if peak > limit:
        return f"sent {name} larger than {limit:,.0f}"
    if name == "probs" and not ((tensor >= 0).all() and ((tensor.double().sum(-1) - 1).abs() < SUM_TOLERANCE).all()):
        return "sent probs that are not distributions"
    return ""


def largest(updates: Mapping[int, Update]) -> str:
    """A sentence that names the client whose update has the largest value; empty if updates hold no numbers."""
    peaks = {
        client: max((tensor.abs().max().item() for tensor in update.tensors.values() if tensor.numel()), default=0)
        for client, update in updates.items()
    }
    client = max(peaks, key=lambda c: peaks[c])
    most, usual = peaks[client], median(peaks.values())
    return f"The largest number, {most:.3g}, came from client {client}; the median is {usual:.3g}." if most else ""


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape is the declared one, in which -n means at most n."""
    return len(shape) == len(declared) and all(
        extent <= -wanted if wanted < 0 else extent == wanted for extent, wanted in zip(shape, declared, strict=True)
    )
