"""Tasks whose computations are executed together: the local updates of a round, on one GPU.

Each task is a thread, but only one runs at a time, in order, until it asks for a computation or ends. When all that
have not ended have asked, their computations are executed at once, in the caller's thread. So nothing depends on the
timing of threads, and nothing that they share needs a lock. Each task has torch's own random numbers to itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fedkd.core.seeds import restored

_current = threading.local()


def run(tasks: Sequence[Callable[[], Any]], execute: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """What each task returns, or the exception that it raises.

    ``execute`` gets what the tasks ask for, in their order, and returns the results; an exception among these is raised
    in the task that asked.
    """
    turns = [_Turn(task) for task in tasks]
    waiting = [turn for turn in turns if turn.proceeds(None)]
    while waiting:
        results = execute([turn.request for turn in waiting])
        waiting = [turn for turn, result in zip(waiting, results, strict=True) if turn.proceeds(result)]
    return [turn.outcome for turn in turns]


def is_task() -> bool:
    """Whether the current thread is a task."""
    return hasattr(_current, "turn")


def ask(request: Any) -> Any:
    """The result of a computation, executed with those of the other tasks. Only in a task."""
    turn: _Turn = _current.turn
    return turn.wait_for(request)


class _Turn(threading.Thread):
    """A task in its thread, which waits while the caller runs, as the caller waits while it runs."""

    def __init__(self, task: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._task, self._own, self._callers = task, threading.Semaphore(0), threading.Semaphore(0)
        self._is_over, self._result = False, None
        self.request: Any = None
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        self._own.acquire()
        _current.turn = self
        try:
            self.outcome = self._task()
        except BaseException as error:
            self.outcome = error
        self._is_over = True
        self._callers.release()

    def proceeds(self, result: Any) -> bool:
        """Run it on with a result; whether it asks for another one. It ends otherwise."""
        self._result = result
        with restored():
            self._own.release()
            self._callers.acquire()
        return not self._is_over

    def wait_for(self, request: Any) -> Any:
        self.request = request
        with restored():
            self._callers.release()
            self._own.acquire()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result
