"""A client's turn on this machine: its memory is read, the app is called, the new memory is put beside the old."""

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

from fedkd.core.errors import Terminated

RUN_ID, SERVER = 1, 0


@dataclass(frozen=True)
class Place:
    """What a turn needs beside its message; client i is node i + 1.

    Memories lie on disk, one file a client, so that clients cost nothing before their first turn and
    no memory of this process after it. A turn leaves its new memory aside; only `accept` makes it
    the client's. So a turn that was cut short can be played again and gives the same bits.
    """

    app: str | ClientApp
    clients: int
    run_config: UserConfig
    memories: Path

    def play(self, message: Message) -> Message:
        """The reply; an error message if the app raises, as on Flower's own engines."""
        node = message.metadata.dst_node_id
        old = self._remembered(node)
        state = recorddict_from_proto(Proto.FromString(old))
        placed: UserConfig = {"partition-id": node - 1, "num-partitions": self.clients}
        context = Context(RUN_ID, node, placed, state, self.run_config)
        try:
            reply = self.load()(message, context)
        except Terminated:
            raise
        except (Exception, SystemExit):  # a client's failure is the round's business, as anywhere in Flower
            return failure(message, traceback.format_exc())
        new: bytes = recorddict_to_proto(context.state).SerializeToString(deterministic=True)
        if new != old:
            with open(self._aside(node), "wb") as file:
                file.write(new)
        return reply

    def accept(self, reply: Message) -> Message:
        """The same reply; what the client remembered in this turn is its memory from now on."""
        if not reply.has_error():
            node = reply.metadata.src_node_id
            with suppress(FileNotFoundError):
                os.replace(self._aside(node), self._kept(node))
        return reply

    def load(self) -> ClientApp:
        """The app, imported if it is named as module:name."""
        return _imported(self.app) if isinstance(self.app, str) else self.app

    def _remembered(self, node: int) -> bytes:
        """The client's memory; what an unfinished turn left aside is dropped."""
        with suppress(FileNotFoundError):
            os.unlink(self._aside(node))
        try:
            with open(self._kept(node), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    # Strings: a path object costs more than the system's call.
    def _kept(self, node: int) -> str:
        return f"{self.memories}/{node}"

    def _aside(self, node: int) -> str:
        return f"{self.memories}/{node}.new"


def failure(message: Message, reason: str) -> Message:
    """The error message that answers for a client."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


@lru_cache
def _imported(path: str) -> ClientApp:
    module, _, name = path.partition(":")
    app: ClientApp = getattr(import_module(module), name)
    return app
