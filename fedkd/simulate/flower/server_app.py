"""The ServerApp: plays every run of a config over whatever grid it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedkd.algorithms.base import Update
from fedkd.core import run_directory
from fedkd.core.config import Config
from fedkd.core.errors import RunError
from fedkd.core.runtime import settle
from fedkd.simulate import experiment
from fedkd.simulate.experiment import prepared
from fedkd.simulate.flower.records import ARRAYS, CONFIG, METRICS, from_record, to_record, weigh
from fedkd.simulate.rounds import Reply, Traffic, last_line
from fedkd.simulate.runner import conduct

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors

app = ServerApp()
POLL = 0.05  # seconds between looks at a grid that has nothing yet
START = 300.0  # seconds for all nodes of an engine to be there
SILENCE = 3600.0  # seconds without any reply that end a round, where --client-timeout sets no limit


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's own door: the run config names everything."""
    config = Config.parse(context.run_config)
    experiment.check(config)
    serve(grid, run_directory.begin(config, config.algorithm))


def serve(grid: Grid, config: Config) -> None:
    """Play the config's algorithms and seeds over a grid, and write the run directory."""
    settle(config.threads)
    conduct(config, lambda: partial(exchange, grid, enroll(grid, config)))


def enroll(grid: Grid, config: Config) -> Sequence[int]:
    """The node that plays each client.

    Raises:
        RunError: not exactly the nodes that are wanted are there in time.

    """
    nodes = grid.get_node_ids()
    if isinstance(nodes, range):  # the local grid's: the i-th node is client i, and a million cost nothing
        return nodes
    deadline = time.monotonic() + START
    while len(found := sorted(set(grid.get_node_ids()))) < config.clients and time.monotonic() < deadline:
        time.sleep(POLL)
    if len(found) != config.clients:
        raise RunError(f"{config.clients} nodes are wanted and {len(found)} are there; start one for each client.")
    node_of: dict[int, int] = {}
    asked = {node: (node, RecordDict()) for node in found}
    for node, reply in _ask(grid, "query", 0, asked, START):
        if reply.has_error():
            reason = reply.error.reason or f"error {reply.error.code}"
            raise RunError(f"A node did not say which client it is: {last_line(reason)}.", reason)
        node_of[int(reply.content.metric_records[METRICS]["client"])] = node  # type: ignore[arg-type]
    if sorted(node_of) != list(range(config.clients)):
        raise RunError(
            f"The nodes call themselves clients {sorted(node_of)}; give each its own partition-id, "
            f"0 to {config.clients - 1}, by --node-config."
        )
    return [node_of[client] for client in range(config.clients)]


def exchange(
    grid: Grid,
    nodes: Sequence[int],
    member: Config,
    kind: str,
    number: int,
    requests: Mapping[int, Tensors],
) -> Iterator[Reply]:
    """Send each client its request and yield their replies as they come.

    Those with most rows come first: what is begun last should not be what takes longest.
    """
    parts = prepared(member).parts
    config = ConfigRecord(
        {"round": number, "algorithm": member.algorithm, "seed": member.seed, "dataset": member.dataset}
    )
    order = sorted(requests, key=lambda client: -len(parts[client]))
    arrays: dict[int, Array] = {}
    packed: dict[tuple[tuple[str, int], ...], tuple[RecordDict, tuple[int, int]]] = {}
    contents = {}
    for client in order:  # what all clients are sent is serialized and weighed once
        key = tuple((name, id(tensor)) for name, tensor in requests[client].items())
        if key not in packed:
            content = RecordDict({ARRAYS: to_record(requests[client], arrays), CONFIG: config})
            packed[key] = content, weigh(content)
        contents[client] = packed[key]
    asked = {client: (nodes[client], content) for client, (content, _) in contents.items()}
    for client, reply in _ask(grid, kind, number, asked, 2 * member.client_timeout or SILENCE):
        yield _reply(client, reply, *contents.pop(client)[1])
    for client, (_, (arrays_down, rest_down)) in contents.items():  # what they were sent has been sent
        yield Reply(client, None, "no reply", Traffic(arrays_down, 0, rest_down, 0))


def _ask(
    grid: Grid, kind: str, number: int, asked: Mapping[int, tuple[int, RecordDict]], patience: float
) -> Iterator[tuple[int, Message]]:
    """Who was asked (a node, with what), and the reply, as replies come.

    It ends after ``patience`` seconds without any: a node that is gone may never be answered for.
    """
    messages = [grid.create_message(content, kind, node, str(number)) for node, content in asked.values()]
    # An engine that cannot take a message gives None for it, or no list at all.
    pending = {sent: who for who, sent in zip(asked, grid.push_messages(messages), strict=False) if sent}
    heard = time.monotonic()
    while pending and time.monotonic() - heard < patience:
        came = False
        for reply in grid.pull_messages(list(pending)):
            came, who = True, pending.pop(reply.metadata.reply_to_message_id, None)
            if who is not None:
                yield who, reply
            heard = time.monotonic()
        if not came:
            time.sleep(POLL)


def _reply(client: int, message: Message, arrays_down: int, rest_down: int) -> Reply:
    if message.has_error():
        failure = message.error.reason or f"error {message.error.code}"
        return Reply(client, None, failure, Traffic(arrays_down, 0, rest_down, 0))
    arrays_up, rest_up = weigh(message.content)
    traffic = Traffic(arrays_down, arrays_up, rest_down, rest_up)
    arrays, metrics = message.content.get(ARRAYS), message.content.get(METRICS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(metrics, MetricRecord):
        return Reply(client, None, "a reply without arrays and metrics", traffic)
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    try:
        tensors, examples = from_record(arrays), int(numbers.pop("num-examples", 0))
    except Exception as error:  # whatever NumPy makes of bytes that a client chose
        return Reply(client, None, f"arrays or numbers that cannot be read: {error}", traffic)
    return Reply(client, Update(tensors, examples, numbers), "", traffic)
