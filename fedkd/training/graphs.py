"""Training steps recorded as CUDA graphs: a replay starts all kernels of a step without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Recording:
    """A training step as a CUDA graph. It holds for the same ``key`` and reads its batch from ``inputs``."""

    key: object
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
