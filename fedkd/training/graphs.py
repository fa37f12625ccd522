"""Training steps recorded as CUDA graphs: a replay starts all kernels of a step without the host."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

KEPT = 128  # stacks whose memory and recorded steps are kept for later rounds
SHARE = 0.8  # of a GPU's memory, for one stack
ROOM = 1.25  # of memory that recorded steps read from, once it has been too small


@dataclass(frozen=True, eq=False)
class Recording:
    """A training step as a CUDA graph, which reads its batches from ``inputs``."""

    inputs: Sequence[Tensor]
    replay: Callable[[], None]


def recorder(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What turns a step into its replay, without running it; None if a device cannot."""
    return (lambda run: record(run, device)) if device.type == "cuda" else None


def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The replay of a step, which is not run.

    Raises:
        RuntimeError: it waits for the device.

    """
    stream, first = _resources(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    # Not torch.cuda.graph, which first returns all free memory to the driver: that takes longer than many steps.
    with torch.cuda.stream(stream):
        graph.capture_begin(first.pool(), capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def inputs(parts: Sequence[Tensor], device: torch.device, room: float) -> list[Tensor]:
    """Zeros on a device for each of the parts, with room for more rows."""
    shapes = [(max(1, int(len(part) * room)), *part.shape[1:]) for part in parts]
    return [torch.zeros(shape, dtype=part.dtype, device=device) for shape, part in zip(shapes, parts, strict=True)]


def upload(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """The parts one after the other, followed by anything, on a device.

    Always in the same memory as long as this is large enough, since recorded steps read from there. The next call with
    parts of the same type and shape overwrites it.
    """
    count, kind = sum(map(len, parts)), (device, parts[0].dtype, parts[0].shape[1:])
    if kind not in _uploaded or len(_uploaded[kind]) < count:
        room = int(count * ROOM) if kind in _uploaded else count
        _uploaded.pop(kind, None)
        _uploaded[kind] = torch.zeros(room, *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
    place = 0
    for part in parts:
        _uploaded[kind][place : place + len(part)].copy_(part)
        place += len(part)
    return _uploaded[kind]


def kept(key: Hashable, build: Callable[[], Any]) -> Any:
    """What ``build`` makes, the same again and again, for the last `KEPT` keys: recorded steps need the same memory."""
    made = _kept.pop(key, None) or build()
    _kept[key] = made
    if len(_kept) > KEPT:
        _kept.popitem(last=False)
    return made


def forget() -> bool:
    """Free what `upload` and `kept` keep; whether there was any of the latter."""
    was_any = bool(_kept)
    _kept.clear()
    _uploaded.clear()
    torch.cuda.empty_cache()
    return was_any


def memory(device: str) -> int:
    """Bytes for a stack. A share of all memory of a GPU, not of what is free, so that it is the same in every run."""
    if not device.startswith("cuda"):
        return sys.maxsize
    return int(SHARE * torch.cuda.get_device_properties(device).total_memory)


_uploaded: dict[tuple[torch.device, torch.dtype, torch.Size], Tensor] = {}
_kept: OrderedDict[Hashable, Any] = OrderedDict()


@cache
def _resources(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """A stream, and a graph that keeps the memory of all graphs.

    They can share it, as none is replayed during another or returns a tensor.
    """
    stream, first = torch.cuda.Stream(device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        first.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        first.capture_end()
    return stream, first
