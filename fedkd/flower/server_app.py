"""The ServerApp: plays every run of a config over whatever grid it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedkd.algorithm import Update
from fedkd.conduct import conduct
from fedkd.config import Config
from fedkd.experiment import prepared
from fedkd.flower.records import ARRAYS, CONFIG, METRICS, from_record, to_record, weigh
from fedkd.rounds import Reply, Traffic
from fedkd.runtime import settle

if TYPE_CHECKING:
    from fedkd.tensors import Tensors

app = ServerApp()
POLL = 0.05  # seconds between looks at a grid that has nothing yet


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run config's algorithms and seeds, and write the run directory."""
    config = Config.parse(context.run_config)
    settle(config.threads)
    conduct(config, partial(exchange, grid))


def exchange(
    grid: Grid, member: Config, kind: str, number: int, clients: list[int], request: Tensors
) -> Iterator[Reply]:
    """Send ``request`` to the clients and yield their replies as they come.

    Those with most rows come first: what is begun last should not be what takes longest.
    """
    nodes = sorted(grid.get_node_ids())
    parts = prepared(member).parts
    arrays, pending = to_record(request), {}
    for client in sorted(clients, key=lambda client: -len(parts[client])):
        config = ConfigRecord({"round": number, "algorithm": member.algorithm, "seed": member.seed})
        config["dataset"] = member.dataset
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        message = grid.create_message(content, kind, nodes[client], str(number))
        down = weigh(content)
        for message_id in grid.push_messages([message]):
            pending[message_id] = (client, down)
    while pending:
        came = False
        for reply in grid.pull_messages(list(pending)):
            came = True
            client, (arrays_down, rest_down) = pending.pop(reply.metadata.reply_to_message_id)
            yield _reply(client, reply, arrays_down, rest_down)
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
        tensors = from_record(arrays)
    except (ValueError, TypeError, OSError) as error:
        return Reply(client, None, f"arrays that cannot be read: {error}", traffic)
    examples = int(numbers.pop("num-examples", 0))
    return Reply(client, Update(tensors, examples, numbers), "", traffic)
