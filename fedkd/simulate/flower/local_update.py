"""A local update on this machine: read the client's memory from its file, call the app, write the new one."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import IO

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import array_from_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedkd.core.checkpoint import with_checksum, without_checksum
from fedkd.core.errors import StorageError, Terminated

Record = ArrayRecord | ConfigRecord | MetricRecord
RUN_ID, SERVER = 1, 0
SMALL = 2**21  # bytes of a memory that stays in RAM
DIED = "the process of this client died, twice"


@dataclass(frozen=True)
class ClientRunner:
    """Runs the app for a client.

    Client memories are files, one per client and run, so that a client costs nothing before its first round and next to
    no RAM after it. The run is the part of a message's group before the last slash. With ``durable`` a memory is on the
    disk before the reply is sent.
    """

    app: str | ClientApp
    clients: int
    run_config: UserConfig
    memories: Path
    durable: bool = False

    def run(self, message: Message, client: int) -> Message:
        """The reply; an error message if the app raises, as on Flower's own engines.

        Raises:
            StorageError: the new memory cannot be written.

        """
        node_config: UserConfig = {"partition-id": client, "num-partitions": self.clients}
        memory = MemoryFile.of(self.memories, message, client, self.durable)
        try:
            context = Context(RUN_ID, client + 1, node_config, memory.read(), self.run_config)
            reply = self.load()(message, context)
        except Terminated:
            raise
        except (Exception, SystemExit):  # a failed client does not end the round, as everywhere in Flower
            return failure(message, traceback.format_exc())
        if not reply.has_error():
            memory.write(context.state)
        return reply

    def load(self) -> ClientApp:
        """The app, imported if it is given as module:name."""
        return _imported(self.app) if isinstance(self.app, str) else self.app


class MemoryFile:
    """The state of a client's `Context` in a file. It is replaced at once, and only if it has changed.

    A record in it may be replaced by another one, but not changed: the same array record is not serialized again.
    The last small states stay in RAM too: parsing one takes as long as training a small network for an epoch on a GPU.
    """

    # Strings: making a path object takes longer than the system call.
    def __init__(self, path: str, durable: bool) -> None:
        self._path, self._durable = path, durable
        self._keep((0, 0, 0), [], RecordDict())

    @classmethod
    def of(cls, folder: str | Path, message: Message, client: int, durable: bool) -> MemoryFile:
        """The file of a client for the run that a message belongs to."""
        return _memory_file(f"{folder}/{message.metadata.group_id.rpartition('/')[0]}/{client + 1}", durable)

    def read(self) -> RecordDict:
        """The state; empty if there is no file.

        Raises:
            DataError: the file is damaged.

        """
        try:
            with open(self._path, "rb") as file:
                if (stamp := _stamp(file)) != self._stamp:
                    items = list(Proto.FromString(without_checksum(file.read(), self._path)).items)
                    self._keep(stamp, items, RecordDict({item.key: _record(item) for item in items}))
        except FileNotFoundError:
            self._keep((0, 0, 0), [], RecordDict())
        return RecordDict(dict(self._read))

    def _keep(self, stamp: tuple[int, int, int], items: list[Proto.Item], state: RecordDict) -> None:
        """The content of the file with this stamp, as items and as records."""
        self._stamp, self._old, self._read = stamp, items, state

    def write(self, state: RecordDict) -> None:
        """Replace what `read` returned.

        Raises:
            StorageError: it cannot be written.

        """
        old = {item.key: item for item in self._old}
        new = [
            old[name] if isinstance(record, ArrayRecord) and record is self._read.get(name) else _item(name, record)
            for name, record in state.items()
        ]
        if new != self._old:
            self._keep(self._replaced(new), new, RecordDict(dict(state)))
        if self._stamp[0] > SMALL:
            self._keep((0, 0, 0), [], RecordDict())

    def _replaced(self, new: list[Proto.Item]) -> tuple[int, int, int]:
        """Write a new file; its stamp."""
        content: bytes = Proto(items=new).SerializeToString(deterministic=True)
        part = f"{self._path}.new"
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(part, "wb") as file:
                file.write(with_checksum(content))
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
                stamp = _stamp(file)
            os.replace(part, self._path)
        except OSError as error:
            raise StorageError.of(error, self._path) from error
        return stamp


@lru_cache(maxsize=64)
def _memory_file(path: str, durable: bool) -> MemoryFile:
    return MemoryFile(path, durable)


def _stamp(file: IO[bytes]) -> tuple[int, int, int]:
    """What changes when another process replaces a file or someone damages it: size, time, number."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


def _record(item: Proto.Item) -> Record:
    """A record of a state. Flower's own function makes each array twice."""
    if not item.HasField("array_record"):
        return recorddict_from_proto(Proto(items=[item]))[item.key]
    record = ArrayRecord()
    for each in item.array_record.items:
        record[each.key] = array_from_proto(each.value)
    return record


def _item(name: str, record: Record) -> Proto.Item:
    (item,) = recorddict_to_proto(RecordDict({name: record})).items
    return item  # type: ignore[no-any-return]


def client_of(message: Message) -> int:
    """The client that a message of the local grid is for: it has node i + 1."""
    return message.metadata.dst_node_id - 1


def failure(message: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    """The error message that is the reply of a client that failed."""
    return Message(Error(code, reason), reply_to=message)


@lru_cache
def _imported(path: str) -> ClientApp:
    module, _, name = path.partition(":")
    app: ClientApp = getattr(import_module(module), name)
    return app
