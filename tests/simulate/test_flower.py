"""Flower's side: bytes, the local grid, and Flower's own FedAvg as an oracle."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedkd.core import tensors
from fedkd.core.checkpoint import without_checksum
from fedkd.core.communication.ledger import SerializedBytes
from fedkd.core.communication.replies import Expected
from fedkd.core.errors import DataError
from fedkd.simulate.experiment import Experiment, prepared
from fedkd.simulate.flower import client_app, local_update, server_app
from fedkd.simulate.flower.local_grid import LocalGrid
from fedkd.simulate.flower.records import count_bytes, from_record, to_record
from fedkd.simulate.rounds import Memories, run_rounds
from tests.conftest import simulated, tiny

LOGITS, X = Expected({"logits": 4 * 40 * 10}), Expected({"x": 3 * 4})
NPY_HEADER = 128  # bytes that NumPy's format puts before the numbers


def exchange_of(config):
    grid, memories = LocalGrid(client_app.app, config.clients, config.run_config()), Memories("run")

    def exchange(kind, number, requests, expected):
        return server_app.exchange(grid, grid.get_node_ids(), config, memories, kind, number, requests, expected)

    return exchange


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_records_keep_every_bit(kind, shape, generator):
    held = {"x": torch.randint(2, shape, generator=generator).to(kind), "y/z": torch.ones(2, 3).t().to(kind)}
    assert tensors.equal(from_record(to_record(held)), held)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,), (1, 4), (2, 3, 4, 5)])
def test_an_array_is_the_one_that_flower_makes(kind, shape, generator):
    x = torch.randint(2, shape, generator=generator).to(kind)
    held = {"x": x, "turned": x.permute(tuple(range(x.ndim)[::-1]))}
    assert to_record(held) == ArrayRecord({name: Array(each.contiguous().numpy()) for name, each in held.items()})


def test_a_header_is_written_and_parsed_once(monkeypatch):
    """It would take longer than everything else around a local update."""
    calls = Counter()
    for name in ("write_array_header_1_0", "read_array_header_1_0"):
        counted(monkeypatch, np.lib.format, name, calls)
    for value in (1, 2):
        held = {"a": torch.full((5, 7, 11), value), "b": torch.full((5, 7, 11), -value)}
        assert tensors.equal(from_record(to_record(held)), held)
    assert calls == {"write_array_header_1_0": 1, "read_array_header_1_0": 1}


def counted(monkeypatch, owner, name: str, calls: Counter) -> None:
    original = getattr(owner, name)

    def call(*args, **options):
        calls[name] += 1
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)


def test_a_record_that_stays_in_a_memory_is_not_serialized_again(tmp_path, monkeypatch):
    old, new = (to_record({"x": torch.full((3,), value)}) for value in (1.0, 2.0))
    owner = ConfigRecord({"run": "a"})
    local_update.MemoryFile(str(tmp_path / "1"), False).write(RecordDict({"old": old, "owner": owner}))
    serialized = []
    original = local_update.recorddict_to_proto
    monkeypatch.setattr(
        local_update, "recorddict_to_proto", lambda state: serialized.extend(state.values()) or original(state)
    )
    file = local_update.MemoryFile(str(tmp_path / "1"), False)
    state = file.read()
    state["new"], state["owner"] = new, owner
    file.write(state)
    assert [record for record in serialized if isinstance(record, ArrayRecord)] == [new]
    content = without_checksum((tmp_path / "1").read_bytes(), "")
    expected = RecordDict({"old": old, "owner": owner, "new": new})
    assert content == original(expected).SerializeToString(deterministic=True)
    assert local_update.MemoryFile(str(tmp_path / "1"), False).read() == expected


@pytest.mark.parametrize("change", ["nothing", "another array", "another setting", "one less"])
def test_a_memory_is_written_if_it_has_changed(tmp_path, change):
    path = tmp_path / "1"
    state = {"memory": to_record({"x": torch.ones(3)}), "owner": ConfigRecord({"run": 1})}
    local_update.MemoryFile(str(path), False).write(RecordDict(dict(state)))
    before = path.stat().st_ino, path.read_bytes()
    file = local_update.MemoryFile(str(path), False)
    read = file.read()
    read["owner"] = ConfigRecord({"run": 1.0 if change == "another setting" else 1})
    if change == "another array":
        read["memory"] = to_record({"x": torch.zeros(3)})
    if change == "one less":
        del read["memory"]
    file.write(read)
    assert ((path.stat().st_ino, path.read_bytes()) == before) is (change == "nothing")


@pytest.mark.parametrize(("limit", "parsed"), [(2**21, 0), (0, 2)])
def test_a_small_memory_is_not_read_again(limit, parsed, grid, tmp_path, monkeypatch):
    monkeypatch.setattr(local_update, "SMALL", limit)
    calls = Counter()
    counted(monkeypatch, local_update, "_record", calls)

    def file() -> local_update.MemoryFile:
        message = grid.create_message(RecordDict(), "query", 1, "run/1")
        return local_update.MemoryFile.of(tmp_path, message, 0, durable=False)

    file().read()
    file().write(RecordDict({"memory": to_record({"x": torch.ones(3)})}))
    for _ in range(2):
        memory = file()
        state = memory.read()
        assert from_record(state["memory"])["x"].tolist() == [1, 1, 1]
        memory.write(state)
        del state["memory"]  # which is not the state that is kept
    assert calls["_record"] == parsed
    other = RecordDict({"memory": to_record({"x": torch.zeros(3)})})
    local_update.MemoryFile(str(tmp_path / "run" / "1"), False).write(other)  # as another process does
    assert file().read() == other
    (tmp_path / "run" / "1").write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged"):
        file().read()
    (tmp_path / "run" / "1").unlink()
    assert not file().read()


def test_evaluation_does_not_select_the_samples_of_a_client(tmp_path, monkeypatch):
    calls = Counter()
    counted(monkeypatch, Experiment, "samples", calls)
    simulated(tmp_path, algorithm="fedavg", rounds=2)
    assert calls["samples"] == 2 * 3  # in training


def test_an_object_array_is_never_unpickled():
    import io

    from flwr.app import Array

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="objects"):
        from_record(ArrayRecord({"x": Array("object", (1,), "numpy.ndarray", buffer.getvalue())}))


def test_bytes_are_those_of_numpys_own_files(tmp_path, generator):
    held = {"logits": torch.randn(7, 10, generator=generator), "round": torch.tensor(3)}
    on_disk = 0
    for name, tensor in held.items():
        np.save(tmp_path / "x.npy", tensor.numpy())
        on_disk += (tmp_path / "x.npy").stat().st_size + len(name)
    content = RecordDict(
        {"arrays": to_record(held), "config": ConfigRecord({"round": 1}), "m": MetricRecord({"a": 1.0})}
    )
    assert count_bytes(content) == (on_disk, (5 + 8) + (1 + 8))


def test_bytes_of_a_round_of_twenty_clients_and_a_thousand_images():
    """20 x 1,000 x 10 x 4 bytes of numbers, and 20 x 134 bytes of framing: NumPy's header and the name."""
    config = tiny(clients=20, proxy="holdout:size=1000", rounds=1)
    experiment = prepared(config)
    (round_,) = run_rounds(experiment.algorithm, experiment.setup, exchange_of(config), 20, experiment.channel)
    framing = 20 * (NPY_HEADER + len("logits"))
    assert framing == 2680
    assert round_.serialized.uplink_arrays == 20 * 1000 * 10 * 4 + framing
    assert round_.serialized.downlink_arrays == 20 * (NPY_HEADER + 8 + len("round"))
    assert round_.serialized.uplink_metadata > 0
    assert round_.serialized.downlink_metadata > 0


LINEAR = """
from torch import nn

def linear(*, classes: int):
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, classes))
"""


def test_our_fedavg_equals_flowers_own_strategy(monkeypatch, tmp_path):
    """The same ClientApp, driven for two rounds by Flower's FedAvg strategy and by ours.

    Flower adds up in float32 and in the order of arrival, we in float64 and in the order of clients: they
    differ by 1e-7 after a round. The model is linear, so that training does not blow that up.
    """
    (tmp_path / "models.py").write_text(LINEAR)
    config = tiny(algorithm="fedavg", partitioner="linear", clients=4, model=f"{tmp_path}/models.py:linear")
    experiment = prepared(config)
    rounds = list(run_rounds(experiment.algorithm, experiment.setup, exchange_of(config), 4, experiment.channel))

    for name in ("run_id", "task_id", "node_id"):  # what an engine of Flower's sets in its processes
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)

    class Theirs(FedAvg):
        """Adds the config that our client expects."""

        def configure_train(self, server_round, arrays, config, grid):
            config.update({"round": server_round, "algorithm": "fedavg", "seed": 0, "dataset": "digits"})
            config.update({"run": "theirs", "memory": server_round - 1, "keep": 0})
            for index, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
                message.content["config"].pop("server-round", None)  # our client refuses settings that it does not know
                message.metadata.__dict__["_message_id"] = f"{server_round}-{index}"
                yield message

    grid = LocalGrid(client_app.app, 4, config.run_config())
    result = Theirs(fraction_evaluate=0.0).start(
        grid,
        to_record(experiment.setup.trainer.initial_weights(experiment.setup.student)),
        num_rounds=2,
        train_config=ConfigRecord(),
    )
    theirs = from_record(result.arrays)
    ours = rounds[-1].state
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6), name
    moved = max(
        (ours[name] - value).abs().max()
        for name, value in experiment.setup.trainer.initial_weights(experiment.setup.student).items()
    )
    assert moved > 0.01


def echo(message: Message, context: Context) -> Message:
    seen = context.state.get("seen")
    count = int(seen["count"]) + 1 if isinstance(seen, ConfigRecord) else 1
    context.state["seen"] = ConfigRecord({"count": count})
    if context.node_config["partition-id"] == 2:
        raise RuntimeError("client two is broken")
    return Message(
        RecordDict({"metrics": MetricRecord({"count": count, "id": int(context.node_config["partition-id"])})}),
        reply_to=message,
    )


@pytest.fixture
def grid() -> LocalGrid:
    app = ClientApp()
    app.query()(echo)
    return LocalGrid(app, 4, {"key": "value"})


def test_the_local_grid_keeps_flowers_contract(grid):
    assert list(grid.get_node_ids()) == [1, 2, 3, 4]
    messages = [grid.create_message(RecordDict(), "query", node, "1") for node in (4, 3, 1)]
    ids = list(grid.push_messages(messages))
    assert [m.metadata.message_id for m in messages] == ids
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "client two is broken" in (replies[1].error.reason or "")
    assert replies[0].content["metrics"]["id"] == 3
    assert list(grid.pull_messages(ids)) == []


def test_every_client_has_one_context_that_lasts(grid):
    for expected in (1, 2, 3):
        messages = [grid.create_message(RecordDict(), "query", node, "1") for node in (1, 2)]
        assert [r.content["metrics"]["count"] for r in grid.send_and_receive(messages)] == [expected, expected]


def test_only_clients_that_are_asked_cost_anything(grid):
    list(grid.send_and_receive([grid.create_message(RecordDict(), "query", 1, "1")]))
    assert [path.name for path in grid._runner.memories.iterdir()] == ["1"]


def test_a_new_run_starts_with_an_empty_memory():
    config = tiny(algorithm="local", compare="fedmd")
    one, other = (prepared(member) for member in config.runs("digits"))
    grid = LocalGrid(client_app.app, config.clients, config.run_config())

    def ask(member, number):
        return next(
            iter(
                server_app.exchange(
                    grid,
                    grid.get_node_ids(),
                    member,
                    Memories("run"),
                    "train",
                    number,
                    {0: {"round": torch.tensor(number)}},
                    {0: LOGITS},
                )
            )
        )

    first = ask(other.config, 1)
    ask(one.config, 1)
    again = ask(other.config, 1)
    assert tensors.equal(first.update.tensors, again.update.tensors)


def test_what_a_silent_client_was_sent_is_counted(grid, monkeypatch):
    """The message to the client was sent, whether or not a reply ever arrives."""
    monkeypatch.setattr(server_app, "_send", lambda *_: iter(()))
    (reply,) = server_app.exchange(
        grid, range(1, 2), tiny(), Memories("run"), "train", 1, {0: {"x": torch.zeros(1000)}}, {0: LOGITS}
    )
    assert (reply.client, reply.update, reply.failure) == (0, None, "no reply")
    assert reply.serialized.downlink_arrays > 4000
    assert reply.serialized.uplink_arrays == 0


def test_replies_that_are_no_replies_are_failures_with_a_reason(grid):
    config = tiny()

    def answers(content, expected=X):
        app = ClientApp()
        app.train()(lambda message, context: Message(content, reply_to=message))
        return next(
            iter(
                server_app.exchange(
                    LocalGrid(app, 1, {}), range(1, 2), config, Memories("run"), "train", 1, {0: {}}, {0: expected}
                )
            )
        )

    assert "the records none instead of arrays and metrics" in answers(RecordDict()).failure
    huge = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(127)
        + b"\n"
    )
    for data in (b"\x93NUMPY but broken", b"", b"PK\x03\x04 no archive", huge):
        broken = to_record({"x": torch.zeros(3)})
        broken["x"].data = data
        reply = answers(RecordDict({"arrays": broken, "metrics": MetricRecord({"num-examples": 1})}))
        assert "cannot be read" in reply.failure, data
    endless = RecordDict({"arrays": to_record({}), "metrics": MetricRecord({"num-examples": math.inf})})
    assert "cannot be read" in answers(endless, Expected({})).failure
    assert isinstance(reply.serialized, SerializedBytes)
    assert math.isfinite(reply.serialized.uplink_arrays)
