"""Processes that play turns: bounded in time, replaced when they die, all gone at the end.

A nursery is forked (or spawned) once, imports the app, and never computes; it forks the workers, so
that a new one is there within milliseconds and all share PyTorch's memory. The nursery ends when
the process that owns it does, however that ends, and takes the workers along.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Self

from flwr.app import Message

from fedkd.core.errors import RunError
from fedkd.simulate.flower.local_update import Place, failure

TRIES = 2  # of a turn whose process died or hung
LONGEST = 86400.0  # seconds that are waited at once: more than 24 days are too many for the system
PID = 8  # bytes of a process number on the nursery's line


class Workers:
    """``count`` processes; a turn that takes longer than ``timeout`` seconds is ended (0: no limit)."""

    def __init__(self, place: Place, count: int, timeout: float, *, fork: bool) -> None:
        self._place, self._count, self._timeout = place, count, timeout or float("inf")
        self._method = "fork" if fork else "spawn"
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        if self._method == "fork":
            self._place.load()  # before the fork, so that its pages are shared
            gc.freeze()  # the collector would write to them
        self._line, theirs = socket.socketpair()
        process = multiprocessing.get_context(self._method).Process  # type: ignore[attr-defined]
        self._nursery = process(target=_nursery, args=(theirs, self._line, self._place), daemon=True)
        self._nursery.start()
        theirs.close()
        self._workers = [_Worker(self._line) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._nursery.join()
        for worker in self._workers:
            worker.connection.close()

    def play(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Replies as they come; messages are begun in the order given."""
        todo, tries = deque(messages), Counter[str]()
        try:
            while todo or any(worker.message for worker in self._workers):
                for worker in self._workers:
                    if todo and worker.message is None:
                        tries[todo[0].metadata.message_id] += 1
                        worker.begin(todo.popleft(), self._timeout)
                for worker in self._ready():
                    message, worker.message = worker.message, None
                    assert message is not None
                    reply, fate = worker.finish()
                    if reply is None:
                        worker.replace()
                        if tries[message.metadata.message_id] < TRIES:
                            todo.appendleft(message)
                            continue
                        reply = failure(message, f"the process that played this client {fate}, twice")
                    yield self._place.accept(reply)
        finally:
            for worker in self._workers:
                if worker.message is not None:  # whoever asked does not want to know any more
                    with suppress(RunError):  # nor why the nursery is gone, on the way out
                        worker.replace()

    def _ready(self) -> list[_Worker]:
        """The workers that have answered, died, or are over their time, once there is one or `LONGEST` is over."""
        busy = {worker.connection: worker for worker in self._workers if worker.message is not None}
        first = min(worker.deadline for worker in busy.values()) - time.monotonic()
        wait(busy, None if first == float("inf") else min(max(0.0, first), LONGEST))
        now = time.monotonic()
        return [worker for worker in busy.values() if worker.connection.poll() or now >= worker.deadline]


class _Worker:
    """One process, seen from the one that owns it."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._start()

    def _start(self) -> None:
        self.message: Message | None = None
        self.deadline = float("inf")
        self.connection, theirs = multiprocessing.Pipe()
        try:
            socket.send_fds(self._line, [bytes(PID)], [theirs.fileno()])
            self._pid = self._line.recv(PID)
        except OSError:
            self._pid = b""
        theirs.close()
        if not self._pid:
            raise RunError("The process that starts the players of clients is gone; try --workers 1.")

    def begin(self, message: Message, timeout: float) -> None:
        self.message, self.deadline = message, time.monotonic() + timeout
        with suppress(OSError):  # it died while idle: seen when its reply is waited for
            self.connection.send(message)

    def finish(self) -> tuple[Message | None, str]:
        """The reply, or what became of the process."""
        if not self.connection.poll():
            return None, "took longer than --client-timeout"
        try:
            return self.connection.recv(), ""
        except (EOFError, OSError):
            return None, "died"

    def replace(self) -> None:
        self.connection.close()
        with suppress(OSError):
            self._line.send(self._pid)
        self._start()


# What runs in the nursery and in the workers.


def _nursery(line: socket.socket, other_end: socket.socket, place: Place) -> None:
    """Fork a worker for each zero that comes with a connection; end the one whose number comes."""
    other_end.close()  # else this process would never see it closed
    for asked in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, they are the owner's to answer
        signal.signal(asked, signal.SIG_IGN)
    place.load()
    children: set[int] = set()
    try:
        while True:
            number, ends, _, _ = socket.recv_fds(line, PID, 1)
            if not number:
                return
            if pid := int.from_bytes(number, "big"):
                _end(pid)
                children.discard(pid)
                continue
            if not (pid := os.fork()):
                line.close()
                _work(Connection(ends[0]), place)
            os.close(ends[0])
            children.add(pid)
            line.send(pid.to_bytes(PID, "big"))
    except OSError:  # the owner is gone
        return
    finally:
        for pid in children:
            _end(pid)


def _end(pid: int) -> None:
    """Kill a child and take note of its end; it keeps its number until then."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _work(connection: Connection, place: Place) -> None:
    """Play turns until the other end is closed. Does not return."""
    try:
        while True:
            connection.send(place.play(connection.recv()))
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)
