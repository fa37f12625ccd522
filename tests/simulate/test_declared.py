"""Nothing but what is declared leaves a client, and the server reads nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.core.communication.replies import Expected
from fedkd.core.errors import LINE, TEXT, last_line, printable
from fedkd.simulate.experiment import prepare
from fedkd.simulate.flower import client_app, records, server_app
from fedkd.simulate.flower.local_grid import LocalGrid
from fedkd.simulate.rounds import Memories
from tests.conftest import simulated, tiny

EXPECTED = Expected({"logits": 48}, ("loss",))


def content(arrays=None, metrics=None, **more) -> RecordDict:
    arrays = {"logits": torch.zeros(4, 3)} if arrays is None else arrays
    metrics = {"num-examples": 3, "loss": 0.5} if metrics is None else metrics
    return RecordDict({"arrays": records.to_record(arrays), "metrics": MetricRecord(metrics), **more})


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (content(), ""),
        (content(metrics={"num-examples": 3}), ""),
        (content(arrays={"logits~": torch.zeros(60, dtype=torch.uint8)}), ""),
        (
            content(metrics={"num-examples": 3, **{f"p{i}": 0.5 for i in range(3072)}}),
            "metrics that are not declared: p0",
        ),
        (content(metrics={"num-examples": 3, "loss": [0.5, 0.25]}), "a list as the metric loss"),
        (content(metrics={"num-examples": [3]}), "a list as the metric num-examples"),
        (content(more=ConfigRecord({"pixels": "x"})), "the records arrays, metrics, more instead of"),
        (content(more=records.to_record({"pixels": torch.zeros(3)})), "the records arrays, metrics, more"),
        (RecordDict({"arrays": records.to_record({})}), "the records arrays instead of arrays and metrics"),
        (RecordDict({"arrays": MetricRecord({}), "metrics": MetricRecord({})}), "the records"),
        (content(arrays={"logits": torch.zeros(4, 3), "pixels": torch.zeros(1)}), "undeclared pixels"),
        (content(arrays={}), "no logits"),
        (content(arrays={"logits": torch.zeros(4, 3), "logits~": torch.zeros(4, dtype=torch.uint8)}), "a tensor twice"),
        (content(arrays={"logits": torch.zeros(1000)}), "logits of 4,128 bytes instead of at most 304"),
    ],
)
def test_a_reply_holds_what_is_declared_or_is_refused_before_it_is_read(sent, expected):
    found = records.undeclared_in_reply(sent, EXPECTED)
    assert expected in found
    assert bool(found) == bool(expected)


def test_an_array_is_read_only_if_its_size_is_that_of_its_header():
    """The header of 128 bytes promises 4 TB: nothing of that is allocated."""
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    for data in (header.ljust(127) + b"\n", header.ljust(127) + b"\n" + bytes(40), bytes(10), b""):
        with pytest.raises((ValueError, KeyError)):
            records.from_record(ArrayRecord({"x": Array("float32", (10,), "numpy.ndarray", data)}))
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert records.from_record(ArrayRecord({"x": Array(columns)}))["x"].tolist() == columns.tolist()


def test_a_server_that_sends_other_things_is_refused():
    settings = {"round": 1, "run": "r", "algorithm": "fedmd", "seed": 0, "dataset": "digits", "memory": 0, "keep": 0}
    arrays = records.to_record({"round": torch.tensor(1)})

    def reply_to(**parts) -> Message:
        grid = LocalGrid(client_app.app, 3, tiny().run_config())
        (reply,) = grid.send_and_receive([grid.create_message(RecordDict(parts), "train", 1, "run/1")])
        return reply

    assert not reply_to(arrays=arrays, config=ConfigRecord(settings)).has_error()
    for parts, expected in (
        ({"config": ConfigRecord(settings)}, "the records config instead of arrays and config"),
        ({"arrays": arrays, "config": ConfigRecord(settings), "more": arrays}, "the records"),
        ({"arrays": arrays, "config": ConfigRecord({**settings, "spy": "x"})}, "settings that are not declared: spy"),
    ):
        assert expected in reply_to(**parts).error.reason


LEAKY = """
from dataclasses import dataclass
import torch
from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.tensors import put

@dataclass(frozen=True)
class Leaky(Algorithm):
    how: str = ""
    metrics = ("loss",)

    def local_update(self, setup, client, message):
        pixels = client.data.pixels.flatten()[:3072].float()
        tensors, metrics = {"mean": torch.zeros(10)}, {"loss": 1.0}
        if self.how == "metrics":
            metrics |= {f"p{i}": pixel.item() for i, pixel in enumerate(pixels)}
        if self.how == "list":
            metrics["loss"] = pixels.tolist()
        if self.how == "tensor":
            tensors["pixels"] = pixels
        if self.how == "large":
            tensors["mean"] = pixels
        return Update(tensors, len(client.data), metrics), put("model", setup.local_weights(client))

    def upload_spec(self, setup, client, number):
        return {"mean": (10,)}
"""


def test_a_plug_in_that_sends_too_much_sends_nothing(tmp_path):
    """The client itself refuses: the reply is an error, and its text holds none of the data."""
    (tmp_path / "leaky.py").write_text(LEAKY)
    for how, expected in (
        ("metrics", "metrics that are not declared: p0, p1, p10 and 3069 more"),
        ("list", "a list as the metric loss"),
        ("tensor", "undeclared pixels"),
        ("large", "mean of 12,416 bytes instead of at most"),
    ):
        config = tiny(algorithm=f"{tmp_path}/leaky.py:Leaky:how={how}")
        held = prepare(config)
        grid = LocalGrid(client_app.app, 3, config.run_config())
        sizes = held.channel.upload_sizes(held.algorithm.upload_spec(held.setup, 0, 1))
        expectation = Expected(sizes, held.algorithm.metrics)
        nodes, memories = grid.get_node_ids(), Memories("run")
        (reply,) = server_app.exchange(grid, nodes, config, memories, "train", 1, {0: {}}, {0: expectation})
        assert "The client was about to send" in reply.failure
        assert expected in reply.failure
        assert (reply.update, reply.serialized.uplink_arrays, reply.serialized.uplink_metadata) == (None, 0, 0)
    assert simulated(tmp_path / "run", algorithm=f"{tmp_path}/leaky.py:Leaky", rounds=1)[0]["participants"] == 3


def test_texts_of_clients_are_short_and_printable(tmp_path):
    secret = "\x1b[2J\x07\u202e" + "x" * 20_000_000 + "\nValueError: " + "y" * 1000 + "\x1b]0;title\x07."
    assert len(printable(secret)) <= TEXT + 1
    assert len(last_line(secret)) <= LINE + 1
    assert last_line(secret).startswith("ValueError: yyy")
    assert last_line(secret).isprintable()
    assert all(character.isprintable() or character == "\n" for character in printable(secret))

    app = ClientApp()

    def fails(message, context):
        raise RuntimeError(secret)

    app.train()(fails)
    grid = LocalGrid(app, 1, {})
    expected = {0: Expected({})}
    (reply,) = server_app.exchange(grid, range(1, 2), tiny(), Memories("run"), "train", 1, {0: {}}, expected)
    assert len(reply.failure) <= TEXT + 1
    assert (reply.cause, "\x1b" in reply.failure) == ("error", False)


def test_numbers_that_no_float_holds_are_refused():
    app = ClientApp()
    app.train()(
        lambda message, context: Message(content(metrics={"num-examples": 1, "loss": 10**400}), reply_to=message)
    )
    grid = LocalGrid(app, 1, {})
    (reply,) = server_app.exchange(grid, range(1, 2), tiny(), Memories("run"), "train", 1, {0: {}}, {0: EXPECTED})
    assert (reply.cause, reply.update) == ("refused", None)
    assert "cannot be read" in reply.failure
