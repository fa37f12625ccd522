"""What clients compute: each on its own, or all that are alike in one stack.

A computation of the trainer is a request: `Fit`, `TaughtFit` or `Prediction`. In a task of `run` it is executed
together with those of the other tasks that have the same key, elsewhere at once and alone. Algorithms cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import ceil
from typing import Any

import torch

from fedkd.core.errors import Terminated
from fedkd.core.notes import say
from fedkd.training import graphs, turns
from fedkd.training.requests import Fit, Prediction
from fedkd.training.stack import NotStackable

MOST = 64  # clients whose computations are executed together
_limits: dict[Hashable, int] = {}  # clients of a stack, where more need too much memory

Request = Fit | Prediction


def result(request: Request) -> Any:
    """The result of a request; in a task of `run`, with those of the other tasks."""
    if turns.is_task():
        return turns.ask(request)
    if not pays(request.network.device):
        return request.alone()
    (result,) = execute([request])
    if isinstance(result, BaseException):
        raise result
    return result


def pays(device: str) -> bool:
    """Whether clients are computed together on a device: on a GPU, which one client does not keep busy."""
    return device.startswith("cuda")


def run(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """What each task returns, or the exception that it raises, in their order; requests are executed together."""
    size = ceil(len(tasks) / ceil(len(tasks) / MOST)) if tasks else 1
    for start in range(0, len(tasks), size):
        yield from turns.run(tasks[start : start + size], execute)


def execute(requests: Sequence[Request]) -> list[Any]:
    """The result of each request, or its exception."""
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.key, []).append(place)
    results: dict[int, Any] = {}
    for places in groups.values():
        results |= zip(places, _executed([requests[place] for place in places]), strict=True)
    return [results[place] for place in range(len(requests))]


def _executed(requests: Sequence[Request], again: bool = False) -> list[Any]:
    """The results of requests with the same key: in stacks, or one after the other if that fails."""
    key, model = requests[0].key, requests[0].network.model
    most = (_limits.get(key) or min(MOST, requests[0].room())) if requests[0].network.stacks else 1
    if len(requests) > most:
        size = ceil(len(requests) / ceil(len(requests) / most))
        return [each for start in range(0, len(requests), size) for each in _executed(requests[start : start + size])]
    if len(requests) == 1 and type(requests[0]) is not Fit:
        return [_alone(requests[0])]
    try:
        return type(requests[0]).stacked(requests)  # type: ignore[arg-type]
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        failure = error
    if len(requests) == 1:
        return [_alone(requests[0])]
    if isinstance(failure, torch.OutOfMemoryError):
        if again or not graphs.forget():
            say(f"the GPU has too little memory for {len(requests)} clients with {model} at once; half are tried")
            _limits[key] = len(requests) // 2
        return _executed(requests, again=True)
    results = [each for request in requests for each in _executed([request])]
    if not any(isinstance(each, BaseException) for each in results):  # which may be of one client only
        reason = str(failure) if isinstance(failure, NotStackable) else f"stacked, it fails: {failure!r}"
        say(f"clients with {model} are computed one after the other: {reason}")
    return results


def _alone(request: Request) -> Any:
    try:
        return request.alone()
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        return error
