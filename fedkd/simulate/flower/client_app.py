"""The ClientApp: a client's turn, and what evaluation asks of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.algorithms.base import Client
from fedkd.core.config import Config
from fedkd.core.errors import DataError, UsageError
from fedkd.core.runtime import settle
from fedkd.core.tensors import put, take
from fedkd.data.partitioners import OWN
from fedkd.simulate.experiment import Experiment, own, prepared
from fedkd.simulate.flower.records import ARRAYS, CONFIG, MEMORY, METRICS, OWNER, from_record, to_record
from fedkd.training import loop

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run the algorithm's local turn; keep the new memory in the context, answer with the update."""
    experiment, client = _client(message, context)
    wire, arrays, remembered = experiment.wire, from_record(_arrays(message.content)), take("wire", client.memory)
    heard = wire.hear(arrays, remembered)
    update, memory = experiment.algorithm.local(experiment.kit, client, heard.tensors)
    said = wire.answer(update.tensors, arrays, remembered)
    number = _int(cast(ConfigRecord, message.content[CONFIG])["round"])
    context.state[MEMORY] = to_record({**memory, **put("wire", wire.memory(number, heard, said))})
    context.state[OWNER] = ConfigRecord({"run": _owner(message, context)})
    metrics = MetricRecord({"num-examples": update.examples, **update.metrics})
    content = RecordDict({ARRAYS: to_record(said.tensors), METRICS: metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the client's own model on the test set: a yardstick of the simulation, no part of a method.

    The logits go up too, so that the server can measure the teacher they make.
    """
    experiment, client = _client(message, context)
    weights = take("model", client.memory)
    logits = experiment.kit.predict(client.model, weights, experiment.test.pixels)
    accuracy, loss = loop.score(logits, experiment.test.labels)
    metrics = MetricRecord({"num-examples": len(experiment.test), "accuracy": accuracy, "loss": loss})
    content = RecordDict({ARRAYS: to_record({"logits": logits}), METRICS: metrics})
    return Message(content, reply_to=message)


@app.query()
def enroll(message: Message, context: Context) -> Message:
    """Say which client this node is: engines of Flower's number their nodes at random."""
    held = context.node_config.get("partition-id")
    if held is None:
        raise UsageError('This node has no number; start it with --node-config "partition-id=0 ...", 1, and so on.')
    return Message(RecordDict({METRICS: MetricRecord({"client": _int(held)})}), reply_to=message)


def _client(message: Message, context: Context) -> tuple[Experiment, Client]:
    """Which run this is, and this client in it. A new run starts with an empty memory."""
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    algorithm, seed, number = str(config["algorithm"]), _int(config["seed"]), _int(config["round"])
    member = _member(tuple(sorted(context.run_config.items())), algorithm, seed, str(config["dataset"]))
    settle(member.threads)
    experiment = prepared(member)
    # A memory of another run is none. What it belongs to is kept with it: a turn that fails changes neither.
    held, owner = context.state.get(MEMORY), context.state.get(OWNER)
    is_ours = isinstance(owner, ConfigRecord) and owner["run"] == _owner(message, context)
    memory = from_record(held) if is_ours and isinstance(held, ArrayRecord) else {}
    data = None
    if member.partitioner == OWN:
        if "data" not in context.node_config:
            raise DataError("This node has no data; start it with --node-config \"... data='/path/to/its/folder'\".")
        data = own(str(context.node_config["data"]), member)
    return experiment, experiment.client(_int(context.node_config["partition-id"]), number, memory, data)


def _owner(message: Message, context: Context) -> str:
    """Which run a memory belongs to."""
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    return f"{context.run_id} {config['algorithm']!s} {config['seed']!s}"


@lru_cache(maxsize=2)
def _member(run_config: tuple[tuple[str, Any], ...], algorithm: str, seed: int, dataset: str) -> Config:
    """Kept, since parsing takes longer than all else around a turn."""
    return Config.parse(dict(run_config)).member(algorithm, seed, dataset)


def _arrays(content: RecordDict) -> ArrayRecord:
    record = content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return record


def _int(value: Any) -> int:
    return int(value)
