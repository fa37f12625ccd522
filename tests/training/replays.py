"""A recorder of training steps for a CPU: a replay runs the step again and refuses what a CUDA graph would not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def recorder(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """In place of `fedkd.training.graphs.recorder`."""
    return Replay


class Replay:
    """A step. Each replay must call the same operations, with the same numbers, on memory at the same places.

    A graph would repeat what was recorded: so a number of Python that changes from step to step, or a tensor that is
    made anew outside of the step, would be wrong in silence there.
    """

    count = 0  # of all replays

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.first = step, list[Any]()
        self.kept: list[Tensor] = []  # whatever came from outside: its memory is not used again for something else

    def __call__(self) -> None:
        with _Trace(self.kept) as trace:
            self.step()
        for number, (mine, before) in enumerate(zip(trace.calls, self.first or trace.calls, strict=True)):
            assert mine == before, f"operation {number}: {before}, now {mine}"
        self.first = trace.calls
        Replay.count += 1


class _Trace(TorchDispatchMode):
    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._made: dict[int, tuple[int, Tensor]] = {}  # what was made within the step, by its memory
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _check(func, args)
        self.calls.append((func, [*self._described(args), *self._described(kwargs)]))
        given = {_memory(each) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(result):
            if isinstance(each, Tensor) and _memory(each) not in given:
                self._made.setdefault(_memory(each), (len(self._made), each))
        return result

    def _described(self, arguments: Any) -> Iterator[Any]:
        for each in pytree.tree_leaves(arguments):
            if not isinstance(each, Tensor):
                yield each
            elif _memory(each) in self._made:
                yield self._made[_memory(each)][0], each.shape, each.stride(), each.storage_offset()
            else:
                self._kept.append(each)
                yield each.data_ptr(), each.shape, each.stride(), each.dtype


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _check(func: Any, args: Any) -> None:
    """Refuse what waits for the device, draws random numbers, or makes a tensor of numbers of Python."""
    aten = torch.ops.aten
    assert func is not aten.lift_fresh.default, func
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        assert not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]), func
    else:
        refused = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
        assert not refused & set(func.tags), func
