"""The local grid: Flower's `Grid` in this process, one `Context` per client, in order."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from uuid import uuid4

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

RUN_ID, SERVER = 1, 0


class LocalGrid(Grid):
    """Runs a ClientApp when its reply is pulled; client i is node i + 1.

    A client's context is made when it is first asked, so that clients that never take part cost
    nothing. A client that raises is answered for by an error message, as on Flower's own engines.
    """

    def __init__(self, app: ClientApp, clients: int, run_config: UserConfig) -> None:
        self._app, self._clients, self._run_config = app, clients, run_config
        self._contexts: dict[int, Context] = {}
        self._pending: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """There is one run, known from the start."""

    @property
    def run(self) -> Run:
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

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies, each computed when it is taken from this iterator."""
        for message_id in message_ids:
            if (message := self._pending.pop(message_id, None)) is not None:
                yield self._answer(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        yield from self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            placed: UserConfig = {"partition-id": node - 1, "num-partitions": self._clients}
            self._contexts[node] = Context(RUN_ID, node, placed, RecordDict(), self._run_config)
        try:
            return self._app(message, self._contexts[node])
        except Exception:  # a client's failure is the round's business, as anywhere in Flower
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc())
            return Message(error, reply_to=message)
