"""The local grid: Flower's `Grid` on this machine, one `Context` per client, in one process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Self
from uuid import uuid4

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

RUN_ID, SERVER = 1, 0
TRIES = 2  # of a turn whose process died


def count_workers(asked: str, clients: int, threads: int, device: str) -> int:
    """How many processes play clients: as asked, or what the cores have room for; one on a GPU."""
    if asked != "auto":
        return int(asked)
    if device.startswith("cuda"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, clients))


class LocalGrid(Grid):
    """Runs a ClientApp; client i is node i + 1.

    With one worker a turn is played in this process when its reply is pulled; with several, turns are
    played by processes, and replies come as they are done. A context is made when its client is first
    asked, so that clients that never take part cost nothing. A client that raises is answered for by
    an error message, as on Flower's own engines.
    """

    def __init__(self, app: str | ClientApp, clients: int, run_config: UserConfig, workers: int = 1) -> None:
        self._app, self._clients, self._run_config, self._workers = app, clients, run_config, workers
        self._contexts: dict[int, Context] = {}
        self._pending: dict[str, Message] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Start the workers, which import while this process prepares."""
        if self._workers > 1:
            self._pool = self._new_pool()
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers at once, whatever they are doing."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            self._pool = None

    def set_run(self, run: Run) -> None:
        """There is one run, known from the start."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        metadata = Metadata(
            run_id=RUN_ID,
            message_id=uuid4().hex,
            src_node_id=SERVER,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or 43200.0,
            message_type=message_type,
        )
        return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._pending[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies, each as soon as it is there."""
        messages = [self._pending.pop(i) for i in message_ids if i in self._pending]
        if self._pool is not None:
            yield from self._from_pool(messages)
            return
        for message in messages:
            yield _turn(self._here, message, self._context(message))[0]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push, then pull."""
        yield from self.pull_messages(self.push_messages(messages))

    @cached_property
    def _here(self) -> ClientApp:
        return _import(self._app) if isinstance(self._app, str) else self._app

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            placed: UserConfig = {"partition-id": node - 1, "num-partitions": self._clients}
            self._contexts[node] = Context(RUN_ID, node, placed, RecordDict(), self._run_config)
        return self._contexts[node]

    def _new_pool(self) -> ProcessPoolExecutor:
        # Spawned, never forked: a fork would copy PyTorch's and Flower's threads in unknown states.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self._workers, context, initializer=_start, initargs=(self._app,))
        for _ in range(self._workers):
            pool.submit(_ready)
        return pool

    def _from_pool(self, messages: list[Message]) -> Iterator[Message]:
        """Replies as they come. When a process dies, all turns in flight are played once more."""
        tries = dict.fromkeys((message.metadata.message_id for message in messages), 0)
        waiting: dict[Future[_Played], Message] = {}
        todo = messages
        while todo or waiting:
            for message in todo:
                tries[message.metadata.message_id] += 1
                waiting[self._submit(message)] = message
            todo = []
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                message = waiting.pop(future)
                try:
                    played = future.result()
                except BrokenProcessPool:
                    if tries[message.metadata.message_id] < TRIES:
                        todo.append(message)
                    else:
                        yield _failure(message, "the process that played this client died, twice")
                    continue
                self._contexts[message.metadata.dst_node_id] = played.context
                yield played.reply

    def _submit(self, message: Message) -> Future[_Played]:
        assert self._pool is not None
        try:
            return self._pool.submit(_play, message, self._context(message))
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(_play, message, self._context(message))


@dataclass(frozen=True)
class _Played:
    """What comes back from a worker: the reply, and the client's context with its new memory."""

    reply: Message
    context: Context


def _turn(app: ClientApp, message: Message, context: Context) -> tuple[Message, Context]:
    try:
        return app(message, context), context
    except Exception:  # a client's failure is the round's business, as anywhere in Flower
        return _failure(message, traceback.format_exc()), context


def _failure(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


# What runs in a worker.


def _import(path: str) -> ClientApp:
    module, _, name = path.partition(":")
    app: ClientApp = getattr(import_module(module), name)
    return app


_app: ClientApp | None = None


def _start(app: str | ClientApp) -> None:
    """Import the app. Ctrl-C is the parent's to answer."""
    global _app
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _app = _import(app) if isinstance(app, str) else app


def _ready() -> None:
    """Nothing: submitting it starts a process."""


def _play(message: Message, context: Context) -> _Played:
    assert _app is not None
    return _Played(*_turn(_app, message, context))
