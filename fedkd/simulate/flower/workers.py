"""Worker processes that run clients: bounded in time, replaced when they die, all gone at the end.

A fork server is forked (or spawned) once, imports the app, and never computes; it forks the workers, so that a new
one starts within milliseconds and all share PyTorch's memory. Each process ends when its parent does, however that
ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Self

from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedkd.core.errors import RunError, StorageError
from fedkd.core.runtime import end_with
from fedkd.simulate.flower.local_update import ClientRunner, client_of, failure

TRIES = 2  # of a local update whose process died or hung
MAX_WAIT = 86400.0  # seconds of one wait: the system refuses more than 24 days
PID = 8  # bytes of a process id on the socket of the fork server


@contextmanager
def _without_script() -> Iterator[None]:
    """Keep a process that is spawned meanwhile from importing the user's script, which would start the run again.

    Workers need nothing of it: a component of it is a spec, ./file.py:Name.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class Workers:
    """``count`` processes; a local update that takes longer than ``timeout`` seconds is ended (0: no limit)."""

    def __init__(self, runner: ClientRunner, count: int, timeout: float, *, fork: bool) -> None:
        self._runner, self._count, self._timeout = runner, count, timeout or float("inf")
        self._method = "fork" if fork else "spawn"
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        if self._method == "fork":
            self._runner.load()  # before the fork, so that its pages are shared
            gc.freeze()  # the collector would write to them
        self._socket, theirs = socket.socketpair()
        process = multiprocessing.get_context(self._method).Process  # type: ignore[attr-defined]
        self._fork_server = process(
            target=_fork_server, args=(theirs, self._socket, self._runner, os.getpid()), daemon=True
        )
        with _without_script():
            self._fork_server.start()
        theirs.close()
        self._workers = [_Worker(self._socket) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._fork_server.join()
        for worker in self._workers:
            worker.connection.close()

    def run(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Replies as they arrive; clients are started in the order of the messages."""
        todo, tries = deque(messages), Counter[str]()
        try:
            while todo or any(worker.message for worker in self._workers):
                for worker in self._workers:
                    if todo and worker.message is None:
                        tries[todo[0].metadata.message_id] += 1
                        worker.start(todo.popleft(), self._timeout)
                for worker in self._ready():
                    message, worker.message = worker.message, None
                    assert message is not None
                    reply, fate = worker.finish()
                    if reply is None:
                        worker.replace()
                        if tries[message.metadata.message_id] < TRIES:
                            todo.appendleft(message)
                            continue
                        reply = failure(
                            message, f"the process of this client {fate}, twice", ErrorCode.CLIENT_APP_CRASHED
                        )
                    yield reply
        finally:
            for worker in self._workers:
                if worker.message is not None:  # the caller does not want the reply any more
                    with suppress(RunError):  # the fork server may be gone already
                        worker.replace()

    def _ready(self) -> list[_Worker]:
        """The workers that have a reply, died, or are over their time, once there is one or `MAX_WAIT` is over."""
        busy = {worker.connection: worker for worker in self._workers if worker.message is not None}
        first = min(worker.deadline for worker in busy.values()) - time.monotonic()
        wait(busy, None if first == float("inf") else min(max(0.0, first), MAX_WAIT))
        now = time.monotonic()
        return [worker for worker in busy.values() if worker.connection.poll() or now >= worker.deadline]


class _Worker:
    """One process, seen from the one that owns it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._fork()

    def _fork(self) -> None:
        self.message: Message | None = None
        self.deadline = float("inf")
        self.connection, theirs = multiprocessing.Pipe()
        try:
            socket.send_fds(self._socket, [bytes(PID)], [theirs.fileno()])
            self._pid = self._socket.recv(PID)
        except OSError:
            self._pid = b""
        theirs.close()
        if not self._pid:
            raise RunError("The process that starts the workers is gone; try --workers 1.")

    def start(self, message: Message, timeout: float) -> None:
        self.message, self.deadline = message, time.monotonic() + timeout
        with suppress(OSError):  # it died while idle: noticed when its reply is waited for
            self.connection.send(message)

    def finish(self) -> tuple[Message | None, str]:
        """The reply, or what became of the process.

        Raises:
            StorageError: it could not write the client's memory.

        """
        if not self.connection.poll():
            return None, "took longer than --client-timeout"
        try:
            reply: Message | StorageError = self.connection.recv()
        except (EOFError, OSError):
            return None, "died"
        if isinstance(reply, StorageError):
            raise reply
        return reply, ""

    def replace(self) -> None:
        self.connection.close()
        with suppress(OSError):
            self._socket.send(self._pid)
        self._fork()


# What runs in the fork server and in the workers.


def _fork_server(sock: socket.socket, other_end: socket.socket, runner: ClientRunner, owner: int) -> None:
    """Fork a worker for each zero that arrives with a connection; end the worker whose process id arrives."""
    end_with(owner)
    other_end.close()  # else this process would never see it closed
    for sent in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, but handled by the owner
        signal.signal(sent, signal.SIG_IGN)
    runner.load()
    children, own_pid = set[int](), os.getpid()
    try:
        while True:
            number, ends, _, _ = socket.recv_fds(sock, PID, 1)
            if not number:
                return
            if pid := int.from_bytes(number, "big"):
                _end(pid)
                children.discard(pid)
                continue
            if not (pid := os.fork()):
                end_with(own_pid)
                sock.close()
                _work(Connection(ends[0]), runner)
            os.close(ends[0])
            children.add(pid)
            sock.send(pid.to_bytes(PID, "big"))
    except OSError:  # the owner is gone
        return
    finally:
        for pid in children:
            _end(pid)


def _end(pid: int) -> None:
    """Kill a child and wait for it; its process id is not reused until then."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _work(connection: Connection, runner: ClientRunner) -> None:
    """Run clients until the other end is closed. Does not return."""
    reply: Message | StorageError
    try:
        while True:
            message = connection.recv()
            try:
                reply = runner.run(message, client_of(message))
            except StorageError as error:
                reply = error
            connection.send(reply)
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)
