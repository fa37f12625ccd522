"""A local update on this machine: read the client's memory, call the app, write the new memory beside the old one."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from fedkd.core.checkpoint import with_checksum, without_checksum
from fedkd.core.errors import Terminated

RUN_ID, SERVER = 1, 0


@dataclass(frozen=True)
class ClientRunner:
    """Runs the app for a client; client i is node i + 1.

    Client memories are files, one per client and run, so that a client costs nothing before its first round and no
    RAM after it. The run is the part of a message's group before the last slash. A local update writes its new memory
    to a separate file; only `accept` makes it the client's. So a local update that was interrupted can be repeated
    and gives the same bits. With ``durable`` a memory is on the disk before the reply is sent.
    """

    app: str | ClientApp
    clients: int
    run_config: UserConfig
    memories: Path
    durable: bool = False

    def run(self, message: Message) -> Message:
        """The reply; an error message if the app raises, as on Flower's own engines."""
        node, group = message.metadata.dst_node_id, message.metadata.group_id
        node_config: UserConfig = {"partition-id": node - 1, "num-partitions": self.clients}
        try:
            old = self._read_memory(node, group)
            state = recorddict_from_proto(Proto.FromString(old))
            context = Context(RUN_ID, node, node_config, state, self.run_config)
            reply = self.load()(message, context)
        except Terminated:
            raise
        except (Exception, SystemExit):  # a failed client does not end the round, as everywhere in Flower
            return failure(message, traceback.format_exc())
        new: bytes = recorddict_to_proto(context.state).SerializeToString(deterministic=True)
        if new != old:
            file = self._new_file(node, group)
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with open(file, "wb") as opened:
                opened.write(with_checksum(new))
                if self.durable:
                    opened.flush()
                    os.fsync(opened.fileno())
        return reply

    def accept(self, reply: Message) -> Message:
        """The same reply; the new memory of this local update becomes the client's."""
        if not reply.has_error():
            place = reply.metadata.src_node_id, reply.metadata.group_id
            with suppress(FileNotFoundError):
                os.replace(self._new_file(*place), self._file(*place))
        return reply

    def load(self) -> ClientApp:
        """The app, imported if it is given as module:name."""
        return _imported(self.app) if isinstance(self.app, str) else self.app

    def _read_memory(self, node: int, group: str) -> bytes:
        """The client's memory; the new memory of an unfinished local update is deleted."""
        with suppress(FileNotFoundError):
            os.unlink(self._new_file(node, group))
        try:
            with open(self._file(node, group), "rb") as file:
                return without_checksum(file.read(), self._file(node, group))
        except FileNotFoundError:
            return b""

    # Strings: making a path object takes longer than the system call.
    def _file(self, node: int, group: str) -> str:
        return f"{self.memories}/{group.rpartition('/')[0]}/{node}"

    def _new_file(self, node: int, group: str) -> str:
        return f"{self._file(node, group)}.new"


def failure(message: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    """The error message that is the reply of a client that failed."""
    return Message(Error(code, reason), reply_to=message)


@lru_cache
def _imported(path: str) -> ClientApp:
    module, _, name = path.partition(":")
    app: ClientApp = getattr(import_module(module), name)
    return app
