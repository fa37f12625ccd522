"""The ClientApp: a client's local update, and the evaluation of its own model."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.algorithms.base import Client
from fedkd.core.config import Config
from fedkd.core.errors import DataError, UsageError
from fedkd.core.runtime import settle
from fedkd.core.tensors import put, take
from fedkd.data.partitioners import OWN
from fedkd.simulate.experiment import Experiment, node_data, prepared
from fedkd.simulate.flower.records import ARRAYS, CONFIG, MEMORY, METRICS, OWNER, from_record, to_record
from fedkd.training import loop

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run the algorithm's local update; keep the new memory in the context and reply with the update."""
    experiment, client = _client(message, context)
    channel, channel_memory = experiment.channel, take("channel", client.memory)
    arrays = from_record(_arrays(message.content))
    received = channel.decode_message(arrays, channel_memory)
    update, memory = experiment.algorithm.local_update(experiment.setup, client, received.tensors)
    sent = channel.encode_update(update.tensors, arrays, channel_memory)
    number = _int(_config(message)["round"])
    _remember(message, context, {**memory, **put("channel", channel.new_memory(number, received, sent))})
    metrics = MetricRecord({"num-examples": update.examples, **update.metrics})
    content = RecordDict({ARRAYS: to_record(sent.tensors), METRICS: metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the client's own model on the test set. This measures the simulation and is not part of a method.

    The logits are uploaded too, so that the server can evaluate their ensemble.
    """
    experiment, client = _client(message, context)
    weights = take("model", client.memory)
    logits = experiment.setup.trainer.predict(client.model, weights, experiment.test.pixels)
    accuracy, loss = loop.score(logits, experiment.test.labels)
    metrics = MetricRecord({"num-examples": len(experiment.test), "accuracy": accuracy, "loss": loss})
    content = RecordDict({ARRAYS: to_record({"logits": logits}), METRICS: metrics})
    return Message(content, reply_to=message)


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Reply with the number of this client: Flower's engines give their nodes random ids."""
    partition_id = context.node_config.get("partition-id")
    if partition_id is None:
        raise UsageError('This node has no number; start it with --node-config "partition-id=0 ...", 1, and so on.')
    return Message(RecordDict({METRICS: MetricRecord({"client": _int(partition_id)})}), reply_to=message)


def _client(message: Message, context: Context) -> tuple[Experiment, Client]:
    """The run that a message is for, and this client in it. A new run starts with an empty memory."""
    config = _config(message)
    algorithm, seed, number = str(config["algorithm"]), _int(config["seed"]), _int(config["round"])
    run = _run(tuple(sorted(context.run_config.items())), algorithm, seed, str(config["dataset"]))
    settle(run.threads)
    experiment = prepared(run)
    kept = context.state.get(_memory_name(_int(config["memory"]))) if _is_owner(message, context) else None
    memory = from_record(kept) if isinstance(kept, ArrayRecord) else {}
    data = None
    if run.partitioner == OWN:
        if "data" not in context.node_config:
            raise DataError("This node has no data; start it with --node-config \"... data='/path/to/its/folder'\".")
        data = node_data(str(context.node_config["data"]), run)
    return experiment, experiment.client(_int(context.node_config["partition-id"]), number, memory, data)


def _remember(message: Message, context: Context, memory: Tensors) -> None:
    """Keep a new memory in the context, beside the ones that may be needed again.

    These are the memory that this local update started from, since the reply may be lost, and that of the last
    checkpoint. A local update that fails changes nothing.
    """
    config = _config(message)
    needed = {_memory_name(_int(config[key])) for key in ("memory", "keep")} if _is_owner(message, context) else set()
    for name in [name for name in context.state if name.startswith(MEMORY) and name not in needed]:
        del context.state[name]
    if memory:
        context.state[_memory_name(_int(config["round"]))] = to_record(memory)
    context.state[OWNER] = ConfigRecord({"run": _owner(message)})


def _memory_name(number: int) -> str:
    """The name of the memory that the local update of a round left."""
    return f"{MEMORY}-{number}"


def _owner(message: Message) -> str:
    """The run (method and seed) that a memory belongs to."""
    config = _config(message)
    return f"{config['run']!s} {config['algorithm']!s} {config['seed']!s}"


def _is_owner(message: Message, context: Context) -> bool:
    """Whether the memories in the context are those of this run."""
    owner = context.state.get(OWNER)
    return isinstance(owner, ConfigRecord) and owner["run"] == _owner(message)


def _config(message: Message) -> ConfigRecord:
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    return config


@lru_cache(maxsize=2)
def _run(run_config: tuple[tuple[str, Any], ...], algorithm: str, seed: int, dataset: str) -> Config:
    """Cached, since parsing takes longer than everything else around a local update."""
    return Config.parse(dict(run_config)).run(algorithm, seed, dataset)


def _arrays(content: RecordDict) -> ArrayRecord:
    record = content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return record


def _int(value: Any) -> int:
    return int(value)
