"""The ServerApp: runs everything that a config asks for over the grid that it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from fedkd.algorithms.base import Update
from fedkd.core import run_directory
from fedkd.core.communication.ledger import SerializedBytes
from fedkd.core.communication.replies import Expected, Reply
from fedkd.core.config import Config
from fedkd.core.errors import RunError, UsageError, last_line, printable
from fedkd.core.options import underscored
from fedkd.core.runtime import settle
from fedkd.simulate import checks, faults
from fedkd.simulate.experiment import prepared
from fedkd.simulate.flower.local_update import DIED
from fedkd.simulate.flower.records import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    FAULT,
    LOST,
    METRICS,
    count_bytes,
    from_record,
    to_record,
    undeclared_in_reply,
)
from fedkd.simulate.rounds import Memories
from fedkd.simulate.runner import run_all

if TYPE_CHECKING:
    from fedkd.core.report.rows import Row
    from fedkd.core.tensors import Tensors

app = ServerApp()
#: The causes of failures (`rounds.CAUSES`) for Flower's error codes; all others are errors of the app.
CAUSES_BY_CODE = {
    ErrorCode.NODE_UNAVAILABLE: "no reply",
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no reply",
    ErrorCode.CLIENT_APP_CRASHED: "died",
}
IN_CLIENT = {"crash", *faults.CORRUPT}  # faults that the client simulates itself
RAY_DIED = "ray.exceptions.Actor"  # ActorDiedError and ActorUnavailableError: Ray tried twice, as our workers do
POLL = 0.05  # seconds between looks at a grid that has nothing yet
START = 300.0  # seconds for all nodes of an engine to be there
SILENCE = 3600.0  # seconds without any reply that end a round if --client-timeout sets no limit


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The entry point for Flower: the run config holds all options."""
    given = context.run_config
    if resume := str(given.get("resume", "")):
        given = run_directory.resumed(Config, Path(resume), underscored(given))
    config = Config.parse(given)
    checks.check(config)
    if config.faults or config.round_timeout:
        raise UsageError("faults and round-timeout are simulated; a deployment has its own.")
    config = run_directory.begin(config, config.algorithm)
    try:
        run_on(grid, config)
    finally:
        run_directory.unlock(Path(config.out))


def run_on(grid: Grid, config: Config) -> None:
    """Run the config's algorithms and seeds over a grid, and write the run directory."""
    for _ in rows_on(grid, config):
        pass


def rows_on(grid: Grid, config: Config) -> Iterator[Row]:
    """The same round by round: the rows as they are read; nothing is computed between two of them."""
    settle(config.threads)
    yield from run_all(config, lambda: partial(exchange, grid, client_nodes(grid, config)))


def client_nodes(grid: Grid, config: Config) -> Sequence[int]:
    """The node of each client.

    Raises:
        RunError: there are not exactly the expected nodes in time.

    """
    nodes = grid.get_node_ids()
    if isinstance(nodes, range):  # of the local grid: the i-th node is client i, and a million cost nothing
        return nodes
    deadline = time.monotonic() + START
    while len(found := sorted(set(grid.get_node_ids()))) < config.clients and time.monotonic() < deadline:
        time.sleep(POLL)
    if len(found) != config.clients:
        raise RunError(f"{config.clients} nodes are needed and {len(found)} are connected; start one for each client.")
    node_of: dict[int, int] = {}
    queries = {node: (node, RecordDict()) for node in found}
    for node, reply in _send(grid, "query", "0", queries, START):
        if reply.has_error():
            reason = reply.error.reason or f"error {reply.error.code}"
            raise RunError(f"A node did not report its client number: {last_line(reason)}.", reason)
        node_of[int(reply.content.metric_records[METRICS]["client"])] = node  # type: ignore[arg-type]
    if sorted(node_of) != list(range(config.clients)):
        raise RunError(
            f"The nodes have the client numbers {sorted(node_of)}; give each its own partition-id, "
            f"0 to {config.clients - 1}, by --node-config."
        )
    return [node_of[client] for client in range(config.clients)]


def exchange(
    grid: Grid,
    nodes: Sequence[int],
    run: Config,
    memories: Memories,
    kind: str,
    number: int,
    messages: Mapping[int, Tensors],
    expected: Mapping[int, Expected],
) -> Iterator[Reply]:
    """Send each client its message and yield the replies as they arrive, checked against what is expected.

    Clients with most samples are first, so that the longest local update does not start last. A reply to a local
    update makes the memory that it left the client's latest one; a client that has lost its memory begins anew.
    """
    partition = prepared(run).training_partition
    named: dict[str, str | int] = {
        "round": number,
        "run": memories.run,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "dataset": run.dataset,
    }
    order = sorted(messages, key=lambda client: -len(partition[client]))
    arrays: dict[int, Array] = {}
    serialized: dict[object, tuple[RecordDict, tuple[int, int]]] = {}
    contents = {}
    for client in order:  # what all clients receive is serialized and counted once
        used: dict[str, str | int] = {
            "memory": memories.latest.get(client, 0),
            "keep": memories.kept.get(client, 0),
        }
        if (fault := expected[client].fault) in IN_CLIENT:
            used[FAULT] = fault
        key = tuple((name, id(tensor)) for name, tensor in messages[client].items()), *used.values()
        if key not in serialized:
            config = ConfigRecord({**named, **used})
            content = RecordDict({ARRAYS: to_record(messages[client], arrays), CONFIG: config})
            serialized[key] = content, count_bytes(content)
        contents[client] = serialized[key]
    addressed = {c: (nodes[c], content) for c, (content, _) in contents.items() if expected[c].fault != "dropout"}
    group = f"{run_directory.run_name(run.algorithm, run.seed)}/{number}"
    for client, reply in _send(grid, kind, group, addressed, 2 * run.client_timeout or SILENCE):
        received = _reply(client, reply, expected[client], *contents.pop(client)[1])
        if received.cause == "lost memory":
            memories.latest.pop(client, None)
        elif kind == "train" and not reply.has_error():
            memories.latest[client] = number
        yield received
    for client, (_, (arrays_bytes, metadata_bytes)) in contents.items():  # a message without a reply was sent, too
        yield Reply(client, None, "no reply", SerializedBytes(arrays_bytes, 0, metadata_bytes, 0), "no reply")


def _send(
    grid: Grid, kind: str, group: str, addressed: Mapping[int, tuple[int, RecordDict]], patience: float
) -> Iterator[tuple[int, Message]]:
    """The key of a message (a node and its content) and the reply to it, as replies arrive.

    It ends after ``patience`` seconds without any reply: there may never be one from a node that is gone.
    """
    messages = [grid.create_message(content, kind, node, group) for node, content in addressed.values()]
    # An engine that cannot take a message returns None for it, or no list at all.
    pending = {sent: key for key, sent in zip(addressed, grid.push_messages(messages), strict=False) if sent}
    last = time.monotonic()
    while pending and time.monotonic() - last < patience:
        has_reply = False
        for reply in grid.pull_messages(list(pending)):
            has_reply, key = True, pending.pop(reply.metadata.reply_to_message_id, None)
            if key is not None:
                yield key, reply
            last = time.monotonic()
        if not has_reply:
            time.sleep(POLL)


def _reply(client: int, message: Message, expected: Expected, downlink_arrays: int, downlink_metadata: int) -> Reply:
    sent = SerializedBytes(downlink_arrays, 0, downlink_metadata, 0)
    if message.has_error():
        reason = printable(message.error.reason or f"error {message.error.code}")
        if RAY_DIED in reason:  # with the number of an actor, which is another one in each run
            return Reply(client, None, DIED, sent, "died")
        cause = "lost memory" if LOST in reason else CAUSES_BY_CODE.get(message.error.code, "error")
        return Reply(client, None, reason, sent, cause)
    uplink_arrays, uplink_metadata = count_bytes(message.content)
    serialized = sent + SerializedBytes(0, uplink_arrays, 0, uplink_metadata)
    if fault := undeclared_in_reply(message.content, expected):
        return Reply(client, None, printable(f"sent {fault}"), serialized, "refused")
    try:
        metrics = {name: float(value) for name, value in message.content.metric_records[METRICS].items()}  # type: ignore[arg-type]
        tensors, examples = from_record(message.content.array_records[ARRAYS]), int(metrics.pop(EXAMPLES, 0))
    except Exception as error:  # whatever NumPy raises for bytes that a client chose
        return Reply(client, None, f"sent arrays or numbers that cannot be read: {error}", serialized, "refused")
    return Reply(client, Update(tensors, examples, metrics), "", serialized)
