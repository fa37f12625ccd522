"""The ClientApp: a client's local update, and the evaluation of its own model."""

from __future__ import annotations

import os
import signal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedkd.algorithms.base import Client
from fedkd.core.communication.channel import ENCODED
from fedkd.core.communication.replies import Expected
from fedkd.core.config import Config
from fedkd.core.errors import DataError, PluginError, RunError, UsageError
from fedkd.core.runtime import settle
from fedkd.core.tensors import put, take
from fedkd.data.partitioners import OWN
from fedkd.simulate.evaluation import per_client
from fedkd.simulate.evaluation.metrics import expected_evaluation
from fedkd.simulate.experiment import Experiment, prepared
from fedkd.simulate.flower.local_update import MemoryFile
from fedkd.simulate.flower.node_data import node_data, split
from fedkd.simulate.flower.records import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    FAULT,
    LOST,
    MEMORY,
    METRICS,
    OWNER,
    from_record,
    to_record,
    undeclared_in_message,
    undeclared_in_reply,
)
from fedkd.simulate.saving import QUERY, expected_model

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors
    from fedkd.data.readers import Images


def only_declared(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Refuse a message, and send no reply, that holds anything that is not declared."""
    kind = message.metadata.message_type
    if kind == "query":
        return call_next(message, context)
    if fault := undeclared_in_message(message.content):
        raise RunError(f"The server sent {fault}; the message was refused.")
    reply = call_next(message, context)
    experiment = prepared(_run_of(message, context))
    number, client = _int(_config(message)["round"]), _int(context.node_config["partition-id"])
    if kind == "train":
        shapes = experiment.algorithm.upload_spec(experiment.setup, client, number)
        expected = Expected(experiment.channel.upload_sizes(shapes), experiment.algorithm.metrics)
    else:
        expected = expected_model(experiment, client) if kind == QUERY else expected_evaluation(experiment)
    if fault := undeclared_in_reply(reply.content, expected):
        raise PluginError(f"The client was about to send {fault}; nothing was sent. See upload_spec of the algorithm.")
    return reply


def simulated_faults(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The reply with the fault that the message asks for (`fedkd.simulate.faults`)."""
    reply = call_next(message, context)
    config = message.content.get(CONFIG)
    fault = config.get(FAULT) if isinstance(config, ConfigRecord) else None
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(fault, str) and not reply.has_error():
        reply.content[ARRAYS] = to_record(_corrupted(from_record(reply.content.array_records[ARRAYS]), fault))
    return reply


def _corrupted(tensors: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    """The tensors of a reply with one of `faults.CORRUPT`: the server can notice each of them."""
    name = max(tensors, key=lambda n: tensors[n].numel(), default="")
    if fault == "extra" or not name:
        return {**tensors, "extra": torch.zeros(3)}
    if fault == "missing":
        return {n: tensor for n, tensor in tensors.items() if n != name}
    tensor, is_encoded = tensors[name], name.endswith(ENCODED)
    changed = {
        "nan": tensor[: len(tensor) // 2] if is_encoded else torch.full(tensor.shape, torch.nan),
        "shape": tensor[None],
        "dtype": tensor.to(torch.int16 if is_encoded else torch.float16),
        "oversized": torch.zeros((256 if is_encoded else 2) * tensor.nbytes + 2**16, dtype=torch.uint8),
    }
    return {**tensors, name: changed[fault]}


def memory_on_disk(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """In a deployment, keep the client's memory in the folder that the node's config names, for a resume."""
    folder = context.node_config.get("memory")
    if not folder or message.metadata.message_type == "query":
        return call_next(message, context)
    file = MemoryFile.of(str(folder), message, _int(context.node_config["partition-id"]), durable=True)
    context.state = file.read()
    reply = call_next(message, context)
    if not reply.has_error():
        file.write(context.state)
    return reply


app = ClientApp(mods=[memory_on_disk, simulated_faults, only_declared])


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
    serialized: dict[int, Array] = {}  # a client often remembers what it sends
    new = {**memory, **put("channel", channel.new_memory(number, received, sent))}
    _remember(message, context, to_record(new, serialized))
    metrics = MetricRecord({EXAMPLES: update.examples, **update.metrics})
    content = RecordDict({ARRAYS: to_record(sent.tensors, serialized), METRICS: metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the client's own model on test images. This measures the simulation and is not part of a method.

    The logits are uploaded too, so that the server can evaluate their ensemble.
    """
    experiment, memory = _memory(message, context)
    trainer, number = experiment.setup.trainer, _int(context.node_config["partition-id"])
    images, received = experiment.client_test, from_record(_arrays(message.content))
    model, weights = experiment.algorithm.evaluated_model(experiment.setup, number, memory, received)
    logits = trainer.predict(model, weights, images.pixels)
    metrics = dict(zip(("accuracy", "loss"), per_client.score(logits, images.labels), strict=True))
    if experiment.config.local_test and len(local := _local_test(experiment, message, context)):
        of_local = per_client.score(trainer.predict(model, weights, local.pixels), local.labels)
        metrics |= dict(zip(per_client.LOCAL, (float(len(local)), *of_local), strict=True))
    measured = MetricRecord({EXAMPLES: len(images), **metrics})
    content = RecordDict({ARRAYS: to_record({"logits": logits}), METRICS: measured})
    return Message(content, reply_to=message)


@app.query(QUERY.removeprefix("query."))
def send_model(message: Message, context: Context) -> Message:
    """Upload the client's own model for ``--save clients``, unless it is one of data that the server does not have."""
    experiment, memory = _memory(message, context)
    if experiment.config.save != "clients" or experiment.config.partitioner == OWN:
        raise RunError("This client does not send its model.")
    content = RecordDict({ARRAYS: to_record(take("model", memory)), METRICS: MetricRecord({EXAMPLES: 1})})
    return Message(content, reply_to=message)


@app.query()
def identify(message: Message, context: Context) -> Message:
    """Reply with the number of this client: Flower's engines give their nodes random ids."""
    partition_id = context.node_config.get("partition-id")
    if partition_id is None:
        raise UsageError('This node has no number; start it with --node-config "partition-id=0 ...", 1, and so on.')
    return Message(RecordDict({METRICS: MetricRecord({"client": _int(partition_id)})}), reply_to=message)


def _client(message: Message, context: Context) -> tuple[Experiment, Client]:
    """The run that a message is for, and this client in it."""
    experiment, memory = _memory(message, context)
    own, partition_id = _own_data(message, context), _int(context.node_config["partition-id"])
    client = experiment.client(partition_id, _int(_config(message)["round"]), memory, own and own[0])
    if own:
        for model in (client.model, *experiment.algorithm.private_models):
            name = f"the number of images in {context.node_config['data']}"
            experiment.setup.trainer.check_batch_norm(model, len(client.data), name)
    return experiment, client


def _local_test(experiment: Experiment, message: Message, context: Context) -> Images:
    """The local test split of this client."""
    if own := _own_data(message, context):
        return own[1]
    return experiment.samples(experiment.local_test_rows(_int(context.node_config["partition-id"])))


def _own_data(message: Message, context: Context) -> tuple[Images, Images] | None:
    """A node's own data for training and its local test split; None if clients have samples of the training set."""
    run = _run_of(message, context)
    if run.partitioner != OWN:
        return None
    if "data" not in context.node_config:
        raise DataError("This node has no data; start it with --node-config \"... data='/path/to/its/folder'\".")
    images = node_data(str(context.node_config["data"]), run)
    return split(images, run, _int(context.node_config["partition-id"]))


def _memory(message: Message, context: Context) -> tuple[Experiment, Tensors]:
    """The run that a message is for, and the client's memory in it. A new run starts with an empty memory."""
    config, run = _config(message), _run_of(message, context)
    settle(run.threads)
    is_owner = _is_owner(message, context)
    kept = context.state.get(_memory_name(_int(config["memory"]))) if is_owner else None
    is_empty = is_owner and not any(name.startswith(MEMORY) for name in context.state)  # the method keeps nothing
    if config["memory"] and kept is None and not is_empty:
        raise RunError(f"{LOST} {_int(config['memory'])}; it begins anew, with the initial weights.")
    return prepared(run), from_record(kept) if isinstance(kept, ArrayRecord) else {}


def _remember(message: Message, context: Context, memory: ArrayRecord) -> None:
    """Keep a new memory in the context, beside the ones that may be needed again.

    These are the memory that this local update started from, since the reply may be lost, and that of the last
    checkpoint. A local update that fails changes nothing.
    """
    config = _config(message)
    needed = {_memory_name(_int(config[key])) for key in ("memory", "keep")} if _is_owner(message, context) else set()
    for name in [name for name in context.state if name.startswith(MEMORY) and name not in needed]:
        del context.state[name]
    if memory:
        context.state[_memory_name(_int(config["round"]))] = memory
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


def _run_of(message: Message, context: Context) -> Config:
    """The config of the run that a message is for."""
    config, options = _config(message), tuple(sorted(context.run_config.items()))
    return _run(options, str(config["algorithm"]), _int(config["seed"]), str(config["dataset"]))


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
