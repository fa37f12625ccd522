"""The local grid: Flower's `Grid` on this machine, in one process or several."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self
from uuid import uuid4

from flwr.app import Message, Metadata, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedkd.core.runtime import cores
from fedkd.simulate.flower.local_update import RUN_ID, SERVER, ClientRunner, client_of
from fedkd.simulate.flower.workers import Workers

SMALL = 0.002  # seconds; a local update that takes less is not worth sending to another process


def count_workers(requested: str, participants: int, threads: int, device: str) -> int:
    """The number of processes for the clients of a round: as requested, or as many as fit the cores; one on a GPU.

    Never more than there are participants.
    """
    if requested != "auto":
        return min(int(requested), participants)
    if device.startswith("cuda") or not hasattr(os, "fork"):
        return 1
    return max(1, min(cores() // threads, participants))


class LocalGrid(Grid):
    """Runs a ClientApp; client i is node i + 1.

    With one worker, no time limit and no simulated ``crashes`` a client runs in this process when its reply is pulled.
    Otherwise clients run in worker processes, in the order in which messages were pushed, and replies arrive as
    clients finish; if the last ones of a kind were `SMALL`, the next run in this process too. With ``together``, what
    clients compute in this process is computed together (`fedkd.training.together`), and replies arrive when all are
    there. A client that raises gives an error message. Client memories are in the directory ``memories``, by default a
    temporary one. They stay if they are ``durable``.
    """

    def __init__(
        self,
        app: str | ClientApp,
        clients: int,
        run_config: UserConfig,
        workers: int = 1,
        *,
        timeout: float = 0,
        crashes: bool = False,
        fork: bool = False,
        together: bool = False,
        memories: Path | None = None,
        durable: bool = False,
    ) -> None:
        self._temporary = None if memories else tempfile.TemporaryDirectory(prefix="memories-")
        folder = memories or Path(self._temporary.name)  # type: ignore[union-attr]
        self._runner = ClientRunner(app, clients, run_config, folder, durable)
        self._is_isolated = timeout > 0 or crashes
        in_processes = workers > 1 or self._is_isolated
        self._workers = Workers(self._runner, workers, timeout, fork=fork) if in_processes else None
        self._together = together
        self._pending: dict[str, Message] = {}
        self._small = set[str]()

    def __enter__(self) -> Self:
        """Start the workers, if any."""
        if self._workers is not None:
            self._workers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers at once, whatever they are doing, and delete client memories that are not durable."""
        if self._workers is not None:
            self._workers.__exit__()
        if self._temporary is not None:
            self._temporary.cleanup()
        elif not self._runner.durable:
            shutil.rmtree(self._runner.memories, ignore_errors=True)

    def set_run(self, run: Run) -> None:
        """Does nothing: there is one run, known from the start."""

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
        return range(1, self._runner.clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._pending[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies, each as soon as it has arrived."""
        messages = [self._pending.pop(i) for i in message_ids if i in self._pending]
        kinds = {message.metadata.message_type for message in messages}
        start = time.perf_counter()
        if self._workers is None or (not self._is_isolated and kinds <= self._small):
            yield from self._run_here(messages)
        else:
            yield from self._workers.run(messages)
        is_small = time.perf_counter() - start < SMALL * len(messages)
        self._small = self._small | kinds if is_small else self._small - kinds

    def _run_here(self, messages: Sequence[Message]) -> Iterator[Message]:
        """The replies of clients in this process, in the order of the messages."""
        tasks = [partial(self._runner.run, message, client_of(message)) for message in messages]
        if not self._together:
            yield from (task() for task in tasks)
            return
        from fedkd.training import together

        for reply in together.run(tasks):
            if isinstance(reply, BaseException):  # a `StorageError`; others are those of a client, in its reply
                raise reply
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push, then pull."""
        yield from self.pull_messages(self.push_messages(messages))
