"""The protocol of a round and of the channel: each branch at its limits, and sums written out by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.core import seeds
from fedkd.core.communication import channel, codecs, entropy, ledger, validation
from fedkd.core.communication.channel import Channel, Encoded
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Failure, Reply
from fedkd.core.communication.validation import validate_update
from fedkd.core.errors import RunError
from fedkd.core.tensors import Int64, UInt8
from fedkd.simulate import rounds
from fedkd.simulate.evaluation import metrics
from fedkd.simulate.experiment import prepare
from fedkd.simulate.rounds import Progress, accept_reply, participants, sample
from tests.conftest import reasons, tiny

PLAIN = Channel(codecs.Float32(), codecs.Float32())
PROBS = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])


def bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


# --- validate_update


def beside(value: float, toward: float) -> float:
    """The next float32 number."""
    return float(np.nextafter(np.float32(value), np.float32(toward)))


@pytest.mark.parametrize(
    ("sent", "declared", "expected"),
    [
        ({}, {}, ""),
        ({"b": PROBS, "a": PROBS}, {"a": (2, 3), "b": (2, 3)}, ""),
        ({"b": PROBS, "c": PROBS}, {"a": (2, 3), "b": (2, 3)}, "sent no a and undeclared c"),
        ({"b": PROBS, "a": PROBS}, {"b": (2, 3)}, "sent undeclared a"),
        ({"a": PROBS}, {"b": (2, 3), "a": (2, 3)}, "sent no b"),
        # Shapes: the same, or at most n where -n is declared.
        ({"a": PROBS}, {"a": (3, 2)}, "sent a of shape (2, 3) instead of (3, 2)"),
        ({"a": PROBS}, {"a": (2, 4)}, "sent a of shape (2, 3) instead of (2, 4)"),
        ({"a": PROBS}, {"a": (3, 3)}, "sent a of shape (2, 3) instead of (3, 3)"),
        ({"a": PROBS}, {"a": (6,)}, "sent a of shape (2, 3) instead of (6,)"),
        ({"a": PROBS}, {"a": (2, 3, 1)}, "sent a of shape (2, 3) instead of (2, 3, 1)"),
        ({"a": PROBS}, {"a": (-2, 3)}, ""),
        ({"a": PROBS}, {"a": (-3, -3)}, ""),
        ({"a": PROBS[:0]}, {"a": (-2, 3)}, ""),
        ({"a": PROBS}, {"a": (-1, 3)}, "sent a of shape (2, 3) instead of (-1, 3)"),
        ({"a": PROBS}, {"a": (-2, -2)}, "sent a of shape (2, 3) instead of (-2, -2)"),
        ({"a": PROBS}, {"a": (-2, 2)}, "sent a of shape (2, 3) instead of (-2, 2)"),
        ({"a": PROBS[:0]}, {"a": (0, 3)}, ""),
        ({"a": PROBS}, {"a": (0, 3)}, "sent a of shape (2, 3) instead of (0, 3)"),
        ({"a": torch.tensor(1.0)}, {"a": ()}, ""),
        ({"a": PROBS}, {"a": ()}, "sent a of shape (2, 3) instead of ()"),
        # Kinds.
        ({"a": PROBS.double()}, {"a": (2, 3)}, "sent a of type torch.float64 instead of torch.float32"),
        ({"a": PROBS.half()}, {"a": (2, 3)}, "sent a of type torch.float16 instead of torch.float32"),
        ({"a": PROBS.long()}, {"a": (2, 3)}, "sent a of type torch.int64 instead of torch.float32"),
        ({"a": PROBS.bool()}, {"a": (2, 3)}, "sent a of type torch.bool instead of torch.float32"),
        ({"a": PROBS.long()}, {"a": Int64((2, 3))}, ""),
        ({"a": PROBS.long()}, {"a": Int64((-2, 3))}, ""),
        ({"a": PROBS}, {"a": Int64((2, 3))}, "sent a of type torch.float32 instead of torch.int64"),
        ({"a": PROBS.int()}, {"a": Int64((2, 3))}, "sent a of type torch.int32 instead of torch.int64"),
        ({"a": PROBS.byte()}, {"a": Int64((2, 3))}, "sent a of type torch.uint8 instead of torch.int64"),
        ({"a": PROBS.byte()}, {"a": UInt8((2, 3))}, ""),
        ({"a": PROBS.long()}, {"a": UInt8((2, 3))}, "sent a of type torch.int64 instead of torch.uint8"),
        ({"a": PROBS.char()}, {"a": UInt8((2, 3))}, "sent a of type torch.int8 instead of torch.uint8"),
        ({"a": PROBS.long()}, {"a": Int64((2, 2))}, "sent a of shape (2, 3) instead of (2, 2)"),
        # Values: one that is not finite is enough, in whichever tensor.
        *(
            ({"a": PROBS, "b": torch.tensor([0.0, bad, 1.0])}, {"a": (2, 3), "b": (3,)}, "sent b with values that are")
            for bad in (math.nan, math.inf, -math.inf)
        ),
        ({"probs": PROBS * torch.tensor([[1.0], [math.nan]])}, {"probs": (2, 3)}, "sent probs with values that are"),
        # Logits have a limit, and nothing else has.
        ({"logits": torch.tensor([1e6, -1e6])}, {"logits": (2,)}, ""),
        ({"logits": torch.tensor([0.0, beside(1e6, math.inf)])}, {"logits": (2,)}, "sent logits larger than 1,000,000"),
        (
            {"logits": torch.tensor([0.0, beside(-1e6, -math.inf)])},
            {"logits": (2,)},
            "sent logits larger than 1,000,000",
        ),
        ({"weights": torch.tensor([1e9, -1e9])}, {"weights": (2,)}, ""),
        ({"weights": torch.tensor([0.0, -1.001e9])}, {"weights": (2,)}, "sent weights larger than 1,000,000,000"),
        ({"counts": torch.tensor([2**40])}, {"counts": Int64((1,))}, ""),
        # Probs are distributions in their last dimension.
        ({"probs": PROBS}, {"probs": (2, 3)}, ""),
        ({"probs": PROBS.expand(4, 2, 3)}, {"probs": (4, 2, 3)}, ""),
        ({"probs": PROBS[:0]}, {"probs": (-2, 3)}, ""),
        ({"probs": PROBS.t().contiguous()}, {"probs": (3, 2)}, "sent probs that are not distributions"),
        ({"probs": PROBS * torch.tensor([[1.0], [0.9]])}, {"probs": (2, 3)}, "sent probs that are not distributions"),
        ({"probs": torch.tensor([[1.001, -0.001, 0.0]])}, {"probs": (1, 3)}, "sent probs that are not distributions"),
        ({"probs": torch.tensor([[0.5, 0.5049]])}, {"probs": (1, 2)}, ""),
        ({"probs": torch.tensor([[0.5, 0.5051]])}, {"probs": (1, 2)}, "sent probs that are not distributions"),
        ({"probs": torch.tensor([[0.5, 0.4951]])}, {"probs": (1, 2)}, ""),
        ({"probs": torch.tensor([[0.5, 0.4949]])}, {"probs": (1, 2)}, "sent probs that are not distributions"),
        ({"scores": PROBS * 3 - 1}, {"scores": (2, 3)}, ""),
    ],
)
def test_tensors_are_those_declared_or_refused_with_the_reason(sent, declared, expected):
    found = validate_update(Update(sent, 1, {"loss": 0.5}), declared)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("examples", "metrics", "is_fine"),
    [
        (1, {}, True),
        (0, {}, False),
        (-1, {}, False),
        (1, {"loss": 1e30, "gap": -1e30}, True),
        (1, {"loss": math.nextafter(1e30, math.inf)}, False),
        (1, {"loss": math.nextafter(-1e30, -math.inf)}, False),
        (1, {"loss": 0.0, "gap": math.nan}, False),
        (1, {"loss": -math.inf, "gap": 0.0}, False),
        (0, {"loss": math.nan}, False),
    ],
)
def test_examples_are_there_and_metrics_are_finite(examples, metrics, is_fine):
    found = validate_update(Update({"probs": PROBS}, examples, metrics), {"probs": (2, 3)})
    assert found == ("" if is_fine else "sent no examples, or a metric that is not finite")


def test_the_largest_metrics_have_a_finite_mean():
    assert math.isfinite(sum([validation.MAX_ABS_METRIC] * 10**6))
    assert (validation.MAX_ABS_LOGIT, validation.MAX_ABS_METRIC, validation.SUM_TOLERANCE) == (1e6, 1e30, 5e-3)


def test_what_bfloat16_does_to_a_distribution_is_let_through(generator):
    for classes in (2, 10, 100):
        probs = bfloat16(torch.rand(2000, classes, generator=generator).softmax(-1))
        assert validate_update(Update({"probs": probs}, 1), {"probs": (2000, classes)}) == ""


# --- accept_reply


class Asking(Algorithm):
    """Sends a table of as many rows as the client's number and one; writes down what it is called with."""

    metrics = ("loss",)

    def __init__(self):
        self.seen = []

    def local_update(self, setup, client, request):
        raise NotImplementedError

    def upload_spec(self, setup, client, number):
        return {"probs": (client + 1, 3), "x": (2,)}

    def check_update(self, setup, update):
        self.seen.append(("objection", setup, update))
        return "I object" if update.examples == 13 else ""


def reply(client=1, probs=PROBS, x=(1.0, 2.0), examples=5, failure="", **metrics):
    return Reply(client, Update({"probs": probs, "x": torch.tensor(x)}, examples, metrics), failure, SerializedBytes())


def accepted(sent, algorithm, link, memory=None):
    """The accepted update and its encoding, or the reason why it is refused."""
    shapes = algorithm.upload_spec("setup", sent.client, 1)
    outcome = accept_reply(sent, algorithm, "setup", shapes, link, memory or {})
    return outcome.reason if isinstance(outcome, Failure) else outcome


def test_a_reply_that_failed_or_is_empty_is_not_looked_into():
    algorithm = Asking()
    for update in (None, reply().update):
        assert accepted(Reply(1, update, "it fell over", SerializedBytes()), algorithm, PLAIN) == "it fell over"
    assert accepted(Reply(1, None, "", SerializedBytes()), algorithm, PLAIN) == "an empty reply"
    assert algorithm.seen == []


def test_an_update_is_admitted_as_it_is_and_held_against_what_its_client_may_send():
    algorithm = Asking()
    update, packed = accepted(reply(loss=0.25), algorithm, PLAIN)
    assert algorithm.seen[0][:2] == ("objection", "setup")
    assert (update.examples, dict(update.metrics)) == (5, {"loss": 0.25})
    assert set(update.tensors) == {"probs", "x"}
    assert torch.equal(update.tensors["probs"], PROBS)
    assert update.tensors["x"].tolist() == [1.0, 2.0]
    assert packed.traffic.float32 == 4 * 6 + 4 * 2
    assert "shape (2, 3) instead of (1, 3)" in accepted(reply(client=0), algorithm, PLAIN)


def test_what_an_algorithm_objects_to_is_not_counted_and_what_is_refused_it_never_sees():
    algorithm = Asking()
    assert accepted(reply(examples=13), algorithm, PLAIN) == "I object"
    algorithm.seen.clear()
    assert "not finite" in accepted(reply(examples=13, x=(math.nan, 0.0)), algorithm, PLAIN)
    assert algorithm.seen == []


def test_what_cannot_be_decoded_has_a_reason():
    link = Channel(codecs.UInt8(), codecs.UInt8())
    broken = Reply(1, Update({"probs~": torch.zeros(3)}, 1), "", SerializedBytes())
    found = accepted(broken, Asking(), link)
    assert found == "sent what cannot be decoded: an encoded tensor is a one-dimensional uint8 tensor"


def test_probs_sum_to_one_after_decoding_and_nothing_else_is_changed(generator):
    probs = torch.randn(2, 3, generator=generator).softmax(-1)
    link = Channel(codecs.BFloat16(delta=True), codecs.Float32())
    x = torch.tensor([3.0, 4.0])
    sent = link.encode_update({"probs": probs, "x": x}, {}, {})
    algorithm = Asking()
    update, packed = accepted(Reply(1, Update(sent.tensors, 7), "", SerializedBytes()), algorithm, link)
    decoded = bfloat16(probs)
    assert not torch.equal(decoded.sum(-1), torch.ones(2))
    wanted = [[float(np.float32(float(p) / math.fsum(map(float, row)))) for p in row] for row in decoded]
    assert torch.allclose(update.tensors["probs"], torch.tensor(wanted), rtol=2e-7, atol=0)
    assert update.tensors["probs"].dtype == torch.float32
    assert torch.equal(update.tensors["x"], x)
    # What is remembered, and what an algorithm may object to, is what went over the wire.
    assert torch.equal(packed.decoded["probs"], decoded)
    assert torch.equal(algorithm.seen[0][2].tensors["probs"], decoded)


def test_a_delta_is_decoded_against_what_is_held():
    link = Channel(codecs.Bits(delta=True), codecs.Float32())
    eye = torch.eye(3)
    first = link.encode_update({"probs": eye[[0, 1]], "x": torch.zeros(2)}, {}, {})
    held = link.new_memory(4, Encoded({}, {}, 0), first)
    asked = {"last": torch.tensor(4)}
    second = link.encode_update({"probs": eye[[0, 2]], "x": torch.zeros(2)}, asked, held)
    coming = Reply(1, Update(second.tensors, 1), "", SerializedBytes())
    update, _ = accepted(coming, Asking(), link, held)
    assert torch.equal(update.tensors["probs"], eye[[0, 2]])
    assert "not available" in accepted(coming, Asking(), link)


# --- who takes part


@pytest.mark.parametrize(
    ("clients", "participation", "count"),
    [
        (10, 1.0, 10),
        (10, 0.24, 2),
        (10, 0.26, 3),
        (20, 0.19, 4),
        (10, 0.04, 1),
        (1, 0.01, 1),
        (7, 0.5, 4),
        (1000, 0.1, 100),
    ],
)
def test_the_number_of_participants_is_rounded_and_at_least_one(clients, participation, count):
    assert participants(clients, participation) == count
    for number in (1, 2, 3):
        chosen = sample(clients, participation, 0, number)
        assert len(set(chosen)) == len(chosen) == count
        assert chosen == sorted(chosen)
        assert all(type(client) is int and 0 <= client < clients for client in chosen)


def test_participants_are_drawn_by_seed_and_round_alone():
    """By a generator whose seed is hashed from seed, purpose and round, as written out here."""
    for seed, number in ((0, 1), (0, 2), (3, 1), (1, 0)):
        text = f"{seed}/str:participation/int:{number}"
        start = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
        drawn = np.random.default_rng(start).choice(50, size=10, replace=False, shuffle=False)
        assert sample(50, 0.2, seed, number) == sorted(drawn.tolist())


# --- the round loop


class Adding(Algorithm):
    """Its state is a list of what it was called with."""

    def __init__(self):
        self.calls, self.inits = [], 0

    def initial_state(self, setup):
        self.inits += 1
        return {"s": torch.tensor([100.0])}

    def broadcast(self, setup, state, client):
        return {"s": state["s"], "mine": torch.tensor([float(client)])}

    def upload_spec(self, setup, client, number):
        return {"probs": (4, 3)}

    def local_update(self, setup, client, request):
        raise NotImplementedError

    def aggregate(self, setup, state, updates, seed):
        self.calls.append((float(state["s"]), list(updates), seed))
        return {"s": state["s"] + len(updates)}


def rows(*classes: int) -> torch.Tensor:
    return torch.eye(3)[list(classes)]


class Nodes:
    """Clients on the far side of a wire, as the ClientApp serves them; some fail, by (round, client)."""

    def __init__(self, link, fails=(), silent=(), lose=()):
        self.link, self.fails, self.silent, self.lose = link, set(fails), set(silent), set(lose)
        self.memories, self.requests, self.kinds = {}, {}, []

    def labels(self, number, client):
        return rows(0, 1, client % 3, number % 3)

    def __call__(self, kind, number, requests, expected=None):
        self.kinds.append((kind, number, list(requests)))
        for client in reversed(list(requests)):
            arrays = requests[client]
            self.requests[number, client] = arrays
            if (number, client) in self.silent:
                continue
            if (number, client) in self.fails:
                yield Reply(client, None, f"failed {number}", SerializedBytes(1, 0, 10, 0))
                continue
            memory = self.memories.get(client, {})
            down = self.link.decode_message(arrays, memory)
            up = self.link.encode_update({"probs": self.labels(number, client)}, arrays, memory)
            self.memories[client] = self.link.new_memory(number, down, up)
            if (number, client) in self.lose:
                self.memories.pop(client)
            yield Reply(client, Update(up.tensors, 1), "", SerializedBytes(2, 3, 20, 30))


@pytest.fixture
def setup(experiment):
    """Of as many rounds and such a participation as are named."""

    def made(**changes):
        return dataclasses.replace(experiment.setup, config=tiny(**changes))

    return made


def test_each_round_asks_admits_tells_and_passes_the_state_on(setup):
    algorithm, nodes = Adding(), Nodes(PLAIN, fails=[(1, 2)], silent=[(2, 0)])
    results = list(rounds.run_rounds(algorithm, setup(rounds=3, seed=5), nodes, 4, PLAIN))
    assert algorithm.inits == 1
    assert [round_.number for round_ in results] == [1, 2, 3]
    assert nodes.kinds == [("train", number, [0, 1, 2, 3]) for number in (1, 2, 3)]
    calls = [(100.0, [0, 1, 3]), (103.0, [1, 2, 3]), (106.0, [0, 1, 2, 3])]
    assert algorithm.calls == [
        (state, clients, seeds.derive(5, "tell", number)) for number, (state, clients) in enumerate(calls, 1)
    ]
    assert [float(nodes.requests[number, 1]["s"]) for number in (1, 2, 3)] == [100.0, 103.0, 106.0]
    assert [float(nodes.requests[2, client]["mine"]) for client in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert [float(round_.state["s"]) for round_ in results] == [103.0, 106.0, 110.0]
    assert [list(round_.updates) for round_ in results] == [[0, 1, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert [reasons(round_.failures) for round_ in results] == [{2: "failed 1"}, {0: "no reply"}, {}]
    assert torch.equal(results[1].updates[2].tensors["probs"], nodes.labels(2, 2))
    # Serialized bytes are of all that replied; the downlink is of all sampled, the uplink of accepted updates.
    assert [round_.serialized for round_ in results] == [
        SerializedBytes(3 * 2 + 1, 3 * 3, 3 * 20 + 10, 3 * 30),
        SerializedBytes(3 * 2, 3 * 3, 3 * 20, 3 * 30),
        SerializedBytes(4 * 2, 4 * 3, 4 * 20, 4 * 30),
    ]
    assert {round_.downlink for round_ in results} == {Traffic(4 * 8, 4 * 8, 4 * 8)}
    assert [round_.uplink for round_ in results] == [Traffic(n * 48, n * 48, n * 48) for n in (3, 3, 4)]
    assert all(round_.channel_memory == {} for round_ in results)


def test_bytes_of_a_refused_update_count_as_serialized_but_not_as_traffic(setup):
    class Bad(Nodes):
        def labels(self, number, client):
            return super().labels(number, client) * (2 if client == 0 else 1)

    (round_,) = rounds.run_rounds(Adding(), setup(rounds=1), Bad(PLAIN), 2, PLAIN)
    assert reasons(round_.failures) == {0: "sent probs that are not distributions"}
    assert round_.serialized == SerializedBytes(4, 6, 40, 60)
    assert round_.uplink == Traffic(48, 48, 48)


def test_only_those_drawn_are_asked(setup):
    nodes = Nodes(PLAIN)
    list(rounds.run_rounds(Adding(), setup(rounds=4, participation=0.3, seed=2), nodes, 10, PLAIN))
    assert [clients for _, _, clients in nodes.kinds] == [sample(10, 0.3, 2, number) for number in (1, 2, 3, 4)]


def test_a_round_without_any_update_names_the_first_client_and_logs_all(setup):
    nodes = Nodes(PLAIN, fails=[(2, 1)], silent=[(2, 0), (2, 2)])
    results = rounds.run_rounds(Adding(), setup(rounds=3), nodes, 3, PLAIN)
    next(results)
    with pytest.raises(RunError) as raised:
        next(results)
    assert str(raised.value) == "Round 2: none of 3 clients sent a usable update; client 0: no reply."
    assert raised.value.details == "client 0\nno reply\nclient 1\nfailed 2\nclient 2\nno reply"


def remembering() -> Channel:
    return Channel(codecs.Bits(delta=True), codecs.Float32(delta=True))


def is_delta(coded: torch.Tensor) -> bool:
    """Whether an encoded tensor is a delta, by its first byte."""
    return int(coded[0]) == 1


def test_what_is_common_is_that_of_the_last_update_that_was_counted(setup):
    """A client that failed or did not reply gets full values; one that was not sampled keeps its memory."""
    link = remembering()
    nodes = Nodes(link, fails=[(2, 0)], silent=[(2, 1)])
    results = list(rounds.run_rounds(Adding(), setup(rounds=4), nodes, 3, link))
    last = {key: int(arrays["last"]) for key, arrays in nodes.requests.items()}
    assert last == {
        **dict.fromkeys([(1, 0), (1, 1), (1, 2)], 0),
        **dict.fromkeys([(2, 0), (2, 1), (2, 2)], 1),
        **dict.fromkeys([(3, 0), (3, 1)], 0),
        (3, 2): 2,
        **dict.fromkeys([(4, 0), (4, 1), (4, 2)], 3),
    }
    for (number, client), arrays in nodes.requests.items():
        assert is_delta(arrays["mine~"]) == (last[number, client] > 0)
    assert [sorted(round_.channel_memory) for round_ in results] == [[0, 1, 2], [2], [0, 1, 2], [0, 1, 2]]
    held = results[-1].channel_memory[1]
    assert set(held) == {"round", "downlink/s", "downlink/mine", "uplink/probs"}
    assert held["round"] == 4
    assert torch.equal(held["uplink/probs"], nodes.labels(4, 1))
    assert float(held["downlink/mine"]) == 1.0
    for round_ in results:
        for client, update in round_.updates.items():
            assert torch.equal(update.tensors["probs"], nodes.labels(round_.number, client))


def test_who_is_not_drawn_keeps_what_it_remembers(setup, monkeypatch):
    link = remembering()
    nodes = Nodes(link)
    monkeypatch.setattr(rounds, "sample", lambda clients, share, seed, number, *_: [0, 1] if number in (1, 4) else [0])
    results = list(rounds.run_rounds(Adding(), setup(rounds=4), nodes, 2, link))
    assert int(nodes.requests[4, 1]["last"]) == 1
    assert is_delta(nodes.requests[4, 1]["mine~"])
    assert int(nodes.requests[4, 0]["last"]) == 3
    assert [int(round_.channel_memory[1]["round"]) for round_ in results] == [1, 1, 1, 4]


def test_a_run_goes_on_exactly_where_it_stopped(setup):
    link, settings = remembering(), setup(rounds=5, participation=0.6, seed=1)
    whole, stopped = Nodes(link, fails=[(2, 1)]), Nodes(link, fails=[(2, 1)])
    wanted = list(rounds.run_rounds(Adding(), settings, whole, 5, link))
    first = []
    for round_ in rounds.run_rounds(Adding(), settings, stopped, 5, link):
        first.append(round_)
        if round_.number == 3:
            break
    held = dict(first[-1].channel_memory)
    algorithm = Adding()
    more = list(rounds.run_rounds(algorithm, settings, stopped, 5, link, after=Progress(3, first[-1].state, held)))
    assert algorithm.inits == 0
    assert [round_.number for round_ in more] == [4, 5]
    assert held.keys() == first[-1].channel_memory.keys(), "what was handed in is left as it is"
    assert stopped.kinds == whole.kinds
    for one, other in zip([*first, *more], wanted, strict=True):
        assert (one.number, float(one.state["s"])) == (other.number, float(other.state["s"]))
        assert (one.serialized, one.downlink, one.uplink) == (other.serialized, other.downlink, other.uplink)
        assert {c: int(t["round"]) for c, t in one.channel_memory.items()} == {
            c: int(t["round"]) for c, t in other.channel_memory.items()
        }
    for key, arrays in whole.requests.items():
        assert arrays.keys() == stopped.requests[key].keys()
        assert all(torch.equal(array, stopped.requests[key][name]) for name, array in arrays.items())


def test_what_all_are_sent_is_coded_once_a_round(setup):
    seen = []

    class Noting(Channel):
        def encode_message(self, message, memory, cache):
            seen.append(len(cache))
            return super().encode_message(message, memory, cache)

    link = Noting(codecs.Float32(), codecs.Float16())
    nodes = Nodes(link)
    list(rounds.run_rounds(Adding(), setup(rounds=2), nodes, 3, link))
    for number in (1, 2):
        one, *others = (nodes.requests[number, client]["s~"] for client in range(3))
        assert all(other is one for other in others)
    assert seen == [0, 2, 3] * 2, "and each round begins anew"


def test_an_empty_state_is_a_state(setup):
    class Stateless(Adding):
        def broadcast(self, setup, state, client):
            assert state == {}
            return {}

        def aggregate(self, setup, state, updates, seed):
            return state

    algorithm = Stateless()
    (round_,) = rounds.run_rounds(algorithm, setup(rounds=1), Nodes(PLAIN), 2, PLAIN, after=Progress(0, {}))
    assert algorithm.inits == 0
    assert round_.state == {}


def test_traffic_adds_up_each_by_itself():
    assert SerializedBytes(1, 20, 300, 4000) + SerializedBytes(5, 60, 700, 8000) == SerializedBytes(6, 80, 1000, 12000)
    assert Traffic(1, 20, 300.5) + Traffic(5, 60, 700.0) == Traffic(6, 80, 1000.5)
    assert SerializedBytes() == SerializedBytes(0, 0, 0, 0)
    assert Traffic() == Traffic(0, 0, 0.0)


# --- the wire


def test_a_round_is_common_only_if_both_ends_name_the_same_one():
    link = Channel(codecs.Bits(delta=True), codecs.Bits(delta=True))
    down = link.encode_message({"probs": rows(0, 1, 2, 0)}, {}, {})
    assert int(down.tensors["last"]) == 0
    assert down.tensors["last"].dtype == torch.int64
    heard = link.decode_message(down.tensors, {})
    assert set(heard.tensors) == {"probs"}
    up = link.encode_update({"probs": rows(1, 1, 1, 1)}, down.tensors, {})
    memory = link.new_memory(7, heard, up)
    assert set(memory) == {"round", "downlink/probs", "uplink/probs"}
    assert torch.equal(memory["downlink/probs"], rows(0, 1, 2, 0))
    assert torch.equal(memory["uplink/probs"], rows(1, 1, 1, 1))

    again = link.encode_message({"probs": rows(0, 1, 2, 1)}, memory, {})
    assert int(again.tensors["last"]) == 7
    assert is_delta(again.tensors["probs~"])
    assert torch.equal(link.decode_message(again.tensors, memory).tensors["probs"], rows(0, 1, 2, 1))
    answer = link.encode_update({"probs": rows(1, 1, 1, 2)}, again.tensors, memory)
    assert is_delta(answer.tensors["probs~"])
    assert torch.equal(link.decode_update(answer.tensors, {"probs": (4, 3)}, memory).tensors["probs"], rows(1, 1, 1, 2))

    # Anything else is not common: another turn, an empty memory, a request that names none.
    other = {**memory, "round": torch.tensor(6)}
    nameless = {name: array for name, array in again.tensors.items() if name != "last"}
    for arrays, held in ((again.tensors, other), (again.tensors, {}), (nameless, memory), ({}, memory)):
        assert not is_delta(link.encode_update({"probs": rows(1, 1, 1, 2)}, arrays, held).tensors["probs~"])
    for arrays, held in ((again.tensors, other), (again.tensors, {}), (nameless, memory)):
        with pytest.raises(ValueError, match="not available"):
            link.decode_message(arrays, held)
    with pytest.raises(ValueError, match="not available"):
        link.decode_update(answer.tensors, {"probs": (4, 3)}, {})


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_only_deltas_are_remembered(up, down):
    link = Channel(codecs.Bits(delta=up), codecs.Bits(delta=down))
    asked = link.encode_message({"probs": rows(0, 1)}, {}, {})
    assert link.has_memory is (up or down)
    assert ("last" in asked.tensors) is (up or down)
    assert asked.added_bytes == (8 if up or down else 0)
    memory = link.new_memory(
        3, link.decode_message(asked.tensors, {}), link.encode_update({"probs": rows(0, 2)}, asked.tensors, {})
    )
    wanted = {"round"} if up or down else set()
    assert set(memory) == wanted | ({"downlink/probs"} if down else set()) | ({"uplink/probs"} if up else set())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logits_are_coded_at_the_temperature_and_come_back_floored(temperature):
    """One bit: the largest class; the others come back at the floor of 1e-4."""
    link = Channel(codecs.Bits(), codecs.Bits(), temperature)
    floor = temperature * math.log(1e-4)
    logits = {"logits": torch.tensor([[3.0, 1.0, 2.0], [-5.0, -5.0, -4.0]])}
    wanted = torch.tensor([[0.0, floor, floor], [floor, floor, 0.0]])
    up = link.encode_update(logits, {}, {}).tensors
    assert torch.allclose(link.decode_update(up, {"logits": (2, 3)}, {}).tensors["logits"], wanted)
    down = link.encode_message(logits, {}, {}).tensors
    assert torch.allclose(link.decode_message(down, {}).tensors["logits"], wanted)
    assert channel.MIN_PROBABILITY == 1e-4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_what_is_coded_of_logits_is_their_softmax_at_the_temperature(temperature):
    link = Channel(codecs.UInt8(), codecs.UInt8(), temperature)
    logits = [0.0, 1.0, 2.5]
    powers = [math.exp(value / temperature) for value in logits]
    levels = [round(255 * power / max(powers)) for power in powers]
    wanted = [temperature * math.log(max(level / sum(levels), 1e-4)) for level in levels]
    for packed, back in (
        (link.encode_update({"logits": torch.tensor([logits])}, {}, {}), link.decode_update),
        (link.encode_message({"logits": torch.tensor([logits])}, {}, {}), None),
    ):
        assert packed.tensors["logits~"].tolist() == [0, 2, 1, 3, *levels]
        found = back(packed.tensors, {"logits": (1, 3)}, {}) if back else link.decode_message(packed.tensors, {})
        assert found.tensors["logits"][0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_probs_have_no_temperature_and_no_floor():
    link = Channel(codecs.UInt8(), codecs.UInt8(), 3.0)
    sent = link.encode_update({"probs": rows(0, 2)}, {}, {}).tensors
    assert torch.equal(link.decode_update(sent, {"probs": (2, 3)}, {}).tensors["probs"], rows(0, 2))


def test_codecs_of_floats_leave_logits_as_they_are():
    link = Channel(codecs.Float16(), codecs.Float16(), 3.0)
    logits = torch.tensor([[1.0, -20.0, 0.5]])
    sent = link.encode_update({"logits": logits}, {}, {}).tensors
    assert torch.equal(link.decode_update(sent, {"logits": (1, 3)}, {}).tensors["logits"], logits)


@pytest.mark.parametrize(
    ("name", "is_soft"),
    [
        ("probs", True),
        ("logits", True),
        ("a/probs", True),
        ("a/b/logits", True),
        ("probs/a", False),
        ("oddlogits", False),
        ("probs~", False),
        ("a_probs", False),
        ("weights", False),
    ],
)
def test_soft_labels_are_known_by_their_names(name, is_soft):
    """A codec of soft labels takes those alone, one of floats all that is floating point."""
    assert ledger.is_soft_label(name) is is_soft
    labels = channel.encode(codecs.Bits(), {name: rows(0, 1)}, {}, {})
    assert set(labels.tensors) == {f"{name}~" if is_soft else name}
    floats = channel.encode(codecs.Float16(), {name: rows(0, 1), "n": torch.tensor([3])}, {}, {})
    assert set(floats.tensors) == {f"{name}~", "n"}


def test_loads_by_hand_of_a_message_that_is_coded_in_part():
    """Four one-bit labels of three classes, two numbers and a counter that go as they are."""
    tensors = {"probs": rows(0, 0, 1, 2), "w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    coded = 1 + 1 + 2 + 1  # a delta or not, dimensions, shape, and four symbols of two bits
    plain = 8 + 8
    packed = channel.encode(codecs.Bits(), tensors, {}, {})
    assert set(packed.tensors) == {"probs~", "w", "n"}
    assert set(packed.encoded) == {"probs"}
    assert packed.tensors["w"] is tensors["w"]
    assert packed.plain_bytes == plain
    assert packed.tensors["probs~"].nbytes == coded
    assert packed.traffic == Traffic(48 + plain, coded + plain, 4 * 1.5 / 8 + plain)  # 1.5 bits: 1/2, 1/4, 1/4
    back = channel.decode(codecs.Bits(), packed.tensors, {}, {"probs": (4, 3), "w": (2,), "n": Int64(())})
    assert back.traffic == packed.traffic
    assert set(back.tensors) == set(tensors)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
    # Floats have no bound but their size, and a request that names a round is eight bytes longer.
    floats = Channel(codecs.Float32(), codecs.Float16(delta=True)).encode_message(tensors, {}, {})
    sizes = (4 + 24) + (3 + 4) + 8 + 8  # headers and halves; the counter; the round
    assert floats.traffic == Traffic(48 + 8 + 8, sizes, sizes)
    assert channel.encode(codecs.Float32(), tensors, {}, {}).traffic == Traffic(64, 64, 64)


def test_the_load_of_a_delta_by_hand():
    """One of four rows changes: a bitmap of four bits in a byte, and one symbol in another."""
    codec, held = codecs.Bits(delta=True), {"probs": rows(0, 0, 1, 2)}
    packed = channel.encode(codec, {"probs": rows(0, 0, 1, 1)}, held, {})
    bitmap = 4 * (0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert packed.traffic == Traffic(48, 4 + 1 + 1, pytest.approx(bitmap / 8))
    back = channel.decode(codec, packed.tensors, held, {"probs": (4, 3)})
    assert back.traffic == packed.traffic
    assert torch.equal(back.decoded["probs"], rows(0, 0, 1, 1))
    assert channel.encode(codecs.Bits(), {"probs": rows(0, 0, 1, 1)}, held, {}).decoded == {}


def test_what_is_kept_is_what_the_other_end_makes_of_it():
    probs = torch.tensor([[0.6, 0.27, 0.13]])
    packed = channel.encode(codecs.UInt8(delta=True), {"probs": probs}, {}, {})
    back = channel.decode(codecs.UInt8(delta=True), packed.tensors, {})
    assert not torch.equal(packed.decoded["probs"], probs)
    assert torch.equal(packed.decoded["probs"], back.decoded["probs"])
    # Of logits, the probabilities: those are what the next delta is to.
    logits = channel.encode(codecs.UInt8(delta=True), {"logits": 2 * probs.log()}, {}, {}, 2.0)
    assert torch.equal(logits.decoded["logits"], packed.decoded["probs"])
    heard = channel.decode(codecs.UInt8(delta=True), logits.tensors, {}, None, 2.0)
    assert torch.equal(heard.decoded["logits"], packed.decoded["probs"])
    again = channel.encode(codecs.UInt8(delta=True), {"logits": 2 * probs.log()}, heard.decoded, {}, 2.0)
    assert again.traffic.entropy_bound == 0


def test_a_delta_is_never_shared_and_what_is_shared_is_whole():
    codec, tensor, made = codecs.Bits(delta=True), rows(0, 1, 2, 0), {}
    delta = channel.encode(codec, {"probs": tensor}, {"probs": rows(0, 1, 2, 1)}, made)
    assert is_delta(delta.tensors["probs~"])
    assert made == {}
    whole = channel.encode(codec, {"probs": tensor}, {}, made)
    assert not is_delta(whole.tensors["probs~"])
    assert set(made) == {id(tensor)}
    assert channel.encode(codec, {"probs": tensor}, {}, made).tensors["probs~"] is whole.tensors["probs~"]
    assert is_delta(channel.encode(codec, {"probs": tensor}, {"probs": rows(0, 1, 2, 1)}, made).tensors["probs~"])


def test_a_client_of_other_memories_is_sent_its_own_delta():
    """All are sent the same table; each delta is to what that client has, and is decoded to the same."""
    link = Channel(codecs.Float32(), codecs.Bits(delta=True))
    table = rows(0, 1, 2, 0)
    held = [
        {"round": torch.tensor(turn), "downlink/probs": rows(*then)}
        for turn, then in ((3, (0, 1, 2, 1)), (5, (1, 1, 2, 0)))
    ]
    made = {}
    for memory in held:
        asked = link.encode_message({"probs": table}, memory, made)
        assert int(asked.tensors["last"]) == int(memory["round"])
        assert torch.equal(link.decode_message(asked.tensors, memory).tensors["probs"], table)


def test_no_more_is_unpacked_than_the_declared_shape_has():
    whole = channel.encode(codecs.Bits(), {"probs": rows(0, 1, 2, 0)}, {}, {}).tensors
    for shape in ((4, 3), (-4, 3), (-4, -3), (12,), (2, 6)):
        assert len(channel.decode(codecs.Bits(), whole, {}, {"probs": shape}).tensors["probs"]) == 4
    for shapes in ({"probs": (3, 3)}, {"probs": (11,)}, {"probs": (-11, 1)}, {}, {"probs~": (4, 3)}):
        with pytest.raises(ValueError, match="it holds more than"):
            channel.decode(codecs.Bits(), whole, {}, shapes)
        with pytest.raises(ValueError, match="it holds more than"):
            Channel(codecs.Bits(), codecs.Float32()).decode_update(whole, shapes, {})


def test_a_request_has_a_limit_too(monkeypatch):
    link, whole = Channel(codecs.Bits(), codecs.Bits()), {"probs": rows(0, 1)}
    asked = link.encode_message(whole, {}, {}).tensors
    monkeypatch.setattr(channel, "MAX_NUMBERS", 6)
    assert torch.equal(link.decode_message(asked, {}).tensors["probs"], whole["probs"])
    monkeypatch.setattr(channel, "MAX_NUMBERS", 5)
    with pytest.raises(ValueError, match="it holds more than 5 numbers"):
        link.decode_message(asked, {})


def test_break_even_by_hand():
    """A thousand weights of 32 bits are 32,000 bits; a label of ten classes at 4 bits each is 40."""
    assert ledger.break_even(1000, 32, 10, 4) == 800
    assert ledger.break_even(1000, 16, 10, 4) == 400
    assert ledger.break_even(1000, 32, 5, 4) == 1600
    assert ledger.break_even(1000, 32, 10, 0.5) == 6400


def test_break_even_of_a_run_is_by_the_bytes_an_image_cost():
    """Two rounds of 40 images: 3 and 2 participants, 500 coded bytes in all, so 500 / 200 bytes an image."""
    held = prepare(tiny(algorithm="ensemble"))
    weights = sum(tensor.numel() for tensor in held.setup.trainer.initial_weights(held.setup.student).values())
    kinds = ("serialized", "float32", "encoded", "entropy_bound", "metadata")
    sizes = [f"{way}link_{kind}_bytes" for kind in kinds for way in ("up", "down")]
    measured = [*sizes, "evaluation_bytes", "training_seconds", "evaluation_seconds"]
    row = {
        "round": 2,
        "test_accuracy": 0.5,
        "test_loss": 1.0,
        "teacher_accuracy": None,
        "client_accuracy": None,
        "failures": [],
        "evaluation_failures": [],
        "excluded": [],
        **dict.fromkeys(measured, 7),
    }
    lines = [
        {**row, "uplink_encoded_bytes": 300, "participants": 3},
        {**row, "uplink_encoded_bytes": 200, "participants": 2},
    ]
    assert metrics.run_summary(held, lines, "")["break_even_proxy_size"] == int(weights * 4 / 2.5)
    none = [{**one, "uplink_encoded_bytes": 0} for one in lines]
    assert metrics.run_summary(held, none, "")["break_even_proxy_size"] is None
    averaging = prepare(tiny(algorithm="fedavg"))
    assert metrics.run_summary(averaging, lines, "")["break_even_proxy_size"] is None


# --- codecs and coders: what has no test of its own elsewhere


def test_the_limits_of_a_coded_tensor():
    """Up to 2^16 classes and 16 dimensions, and no more."""
    wide = torch.zeros(1, 2**16)
    wide[0, 70_000 - 2**13] = 1
    assert torch.equal(codecs.Bits().decode(codecs.Bits().encode(wide, None), None, 2**16), wide)
    with pytest.raises(ValueError, match="1 to 65536 classes, not 65537"):
        codecs.Bits().encode(torch.zeros(1, 2**16 + 1), None)
    deep = torch.ones([1] * 16)
    assert codecs.Bits().decode(codecs.Bits().encode(deep, None), None, 1).shape == deep.shape


@pytest.mark.parametrize(("off", "is_fine"), [(9e-4, True), (-9e-4, True), (1.1e-3, False), (-1.1e-3, False)])
def test_a_row_may_miss_one_by_a_thousandth(off, is_fine):
    row = torch.tensor([[0.5, 0.5 + off]])
    if is_fine:
        assert codecs.UInt8().encode(row, None).numel() == 6
    else:
        with pytest.raises(ValueError, match="each row must sum to one"):
            codecs.UInt8().encode(row, None)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 129, 16_383, 16_384, 2**31, 2**56 - 1])
def test_numbers_by_hand(value):
    """Seven bits to a byte, the low ones first; all but the last have the high bit."""
    digits = []
    rest = value
    while True:
        rest, digit = divmod(rest, 128)
        digits.append(digit)
        if not rest:
            break
    wanted = bytes([*(128 + digit for digit in digits[:-1]), digits[-1]])
    assert entropy.number(value) == wanted
    assert entropy.read_number(entropy.BytesIO(wanted)) == value


def test_entropy_by_hand():
    assert entropy.entropy(np.array([[0, 0], [3, 1]], np.uint8)) == pytest.approx(2 * 1 + 2 * 2)
    assert entropy.entropy(np.array([5, 5, 5], np.uint8)) == 0
    assert entropy.entropy(np.zeros(0, np.uint8)) == 0


@pytest.mark.parametrize("coder", ["none", "zstd", "range"])
def test_changed_rows_alone_go_and_the_others_are_those_held(coder):
    """Also where every row changed, or none; against all that is at hand and is no reference."""
    codec = codecs.Bits(bits=2, coder=coder, delta=True)
    held = codec.decode(codec.encode(rows(0, 1, 2, 2), None), None, 12)
    for classes, changed in (((0, 1, 2, 2), 0), ((0, 1, 2, 1), 1), ((1, 2, 0, 0), 4)):
        sent = codec.encode(rows(*classes), held)
        assert is_delta(sent)
        assert torch.equal(codec.decode(sent, held, 12), rows(*classes))
        if coder == "none":
            bits = changed * 3 * 2
            assert sent.numel() == 4 + 1 + -(-bits // 8)
            assert int(sent[4]).bit_count() == changed
        plain = codecs.Bits(bits=2, coder=coder)  # knows no deltas
        assert torch.equal(plain.encode(rows(*classes), held), plain.encode(rows(*classes), None))
        with pytest.raises(ValueError, match="not available"):
            plain.decode(sent, held, 12)
        other = held.roll(1, 0)
        assert (torch.equal(codec.decode(sent, other, 12), rows(*classes))) is (changed == 4)
