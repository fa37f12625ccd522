"""The round loop: who is asked, what is accepted, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.core import seeds
from fedkd.core.communication.channel import Channel
from fedkd.core.communication.codecs import Float32, UInt8
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Failure, Reply
from fedkd.core.errors import RunError
from fedkd.simulate.rounds import Progress, accept_reply, participants, run_rounds, sample
from tests.conftest import reasons, tiny

PLAIN = Channel(Float32(), Float32())
BYTES = SerializedBytes(1, 20, 300, 4000)


class Adding(Algorithm):
    """Sends the sum and adds what comes; a client may not upload exactly 13."""

    def __init__(self):
        self.told = []

    def initial_state(self, setup):
        assert setup is not None
        return {"sum": torch.zeros(1)}

    def broadcast(self, setup, state, client):
        assert setup is not None
        return {"sum": state["sum"], "client": torch.tensor([client])}

    def upload_spec(self, setup, client, number):
        assert setup is not None
        return {"x": (1,)} if client != 5 else {"x": (3 * number - 2,)}

    def local_update(self, setup, client, message):
        raise NotImplementedError

    def check_update(self, setup, update):
        assert setup is not None
        return "unlucky" if update.tensors["x"][0] == 13 else ""

    def aggregate(self, setup, state, updates, seed):
        assert setup is not None
        self.told.append((list(updates), seed))
        return {"sum": state["sum"] + sum(update.tensors["x"] for update in updates.values())}


def federation(rounds=2, participation=1.0, seed=3):
    return SimpleNamespace(config=tiny(rounds=rounds, participation=participation, seed=seed))


def exchange_of(values, calls=None):
    """An exchange with given answers, in reversed order: a number, a failure, or nothing."""

    def exchange(kind, number, messages, expected=None):
        if calls is not None:
            calls.append((kind, number, messages))
        for client in reversed(messages):
            value = values.get(client)
            if isinstance(value, str):
                yield Reply(client, None, value, BYTES)
            elif value is not None:
                yield Reply(client, Update({"x": torch.tensor([value])}, 1), "", BYTES)

    return exchange


def test_two_rounds_of_three_clients():
    calls, method = [], Adding()
    rounds = list(run_rounds(method, federation(), exchange_of({0: 1.0, 1: 2.0, 2: 4.0}, calls), 3, PLAIN))
    assert [(kind, number, list(messages)) for kind, number, messages in calls] == [
        ("train", 1, [0, 1, 2]),
        ("train", 2, [0, 1, 2]),
    ]
    assert [messages[2]["client"].item() for _, _, messages in calls] == [2, 2]
    assert [messages[0]["sum"].item() for _, _, messages in calls] == [0.0, 7.0]
    assert method.told == [([0, 1, 2], seeds.derive(3, "tell", 1)), ([0, 1, 2], seeds.derive(3, "tell", 2))]
    assert [round_.number for round_ in rounds] == [1, 2]
    assert [round_.state["sum"].item() for round_ in rounds] == [7.0, 14.0]
    for round_ in rounds:
        assert [update.tensors["x"].item() for update in round_.updates.values()] == [1.0, 2.0, 4.0]
        assert round_.failures == []
        assert round_.serialized == SerializedBytes(3, 60, 900, 12000)
        assert round_.downlink == Traffic(3 * (4 + 8), 3 * (4 + 8), 3.0 * (4 + 8))
        assert round_.uplink == Traffic(12, 12, 12.0)
        assert round_.channel_memory == {}


def test_each_failure_is_named_and_the_others_go_on():
    values = {0: 1.0, 1: "it fell over", 2: float("nan"), 3: 13.0, 5: 2.0}
    (round_,) = run_rounds(Adding(), federation(1), exchange_of(values), 6, PLAIN)
    assert reasons(round_.failures) == {
        1: "it fell over",
        2: "sent x with values that are not finite",
        3: "unlucky",
        4: "no reply",
    }
    assert list(round_.updates) == [0, 5]
    assert round_.state["sum"].item() == 3.0
    assert round_.serialized == SerializedBytes(5, 100, 1500, 20000)
    assert round_.downlink == Traffic(72, 72, 72.0)
    assert round_.uplink == Traffic(8, 8, 8.0)


def test_what_a_client_may_upload_is_asked_of_the_state_of_the_round():
    rounds = run_rounds(Adding(), federation(2), exchange_of({4: 2.0, 5: 1.0}), 6, PLAIN)
    assert 5 in next(rounds).updates
    assert reasons(next(rounds).failures)[5] == "sent x of shape (1,) instead of (4,)"


def test_a_round_without_updates_ends_the_run_with_the_reason():
    values = {1: "a first line\nTraceback\nValueError: too bad", 2: "gone"}
    with pytest.raises(RunError) as caught:
        list(
            run_rounds(
                Adding(), federation(), exchange_of(values), 3, PLAIN, after=Progress(1, {"sum": torch.zeros(1)})
            )
        )
    assert str(caught.value) == "Round 2: none of 3 clients sent a usable update; client 0: no reply."
    expected = "client 0\nno reply\nclient 1\na first line\nTraceback\nValueError: too bad\nclient 2\ngone"
    assert caught.value.details == expected


def test_the_reason_of_the_first_client_is_its_last_line():
    with pytest.raises(
        RunError, match=r"^Round 1: none of 2 clients sent a usable update; client 0: ValueError: too bad\.$"
    ):
        list(run_rounds(Adding(), federation(), exchange_of({0: "a line\nValueError: too bad", 1: "x"}), 2, PLAIN))


def test_a_run_continues_from_a_state_and_a_round():
    calls = []
    state = {"sum": torch.tensor([100.0])}
    rounds = list(run_rounds(Adding(), federation(3), exchange_of({0: 1.0}, calls), 1, PLAIN, after=Progress(1, state)))
    assert [round_.number for round_ in rounds] == [2, 3]
    assert [round_.state["sum"].item() for round_ in rounds] == [101.0, 102.0]
    assert list(run_rounds(Adding(), federation(3), exchange_of({0: 1.0}), 1, PLAIN, after=Progress(3, state))) == []


class Labels(Adding):
    """Soft labels in both directions."""

    metrics = ("loss",)
    probs = torch.tensor([[0.2, 0.8], [1.0, 0.0]])

    def broadcast(self, setup, state, client):
        return {"probs": self.probs}

    def upload_spec(self, setup, client, number):
        return {"probs": (2, 2)}

    def check_update(self, setup, update):
        return ""

    def aggregate(self, setup, state, updates, seed):
        return state


def delta_exchange(channel, memories, absent, calls):
    """Clients with a memory of their own, some of whom are absent in some round."""

    def exchange(kind, number, messages, expected=None):
        calls.append(messages)
        for client, message in messages.items():
            if (client, number) in absent:
                continue
            memory = memories.get(client, {})
            heard = channel.decode_message(message, memory)
            answer = channel.encode_update({"probs": Labels.probs}, message, memory)
            memories[client] = channel.new_memory(number, heard, answer)
            yield Reply(client, Update(answer.tensors, 1), "", SerializedBytes())

    return exchange


def test_both_ends_keep_in_step_and_who_fails_is_sent_all_again():
    channel = Channel(UInt8(delta=True), UInt8(delta=True))
    calls, theirs = [], {}
    rounds = list(run_rounds(Labels(), federation(4), delta_exchange(channel, theirs, {(1, 2)}, calls), 2, channel))
    sizes = [[messages[client]["probs~"].numel() for client in (0, 1)] for messages in calls]
    assert sizes == [[8, 8], [5, 5], [5, 8], [5, 5]]
    assert [[messages[client]["last"].item() for client in (0, 1)] for messages in calls] == [
        [0, 0],
        [1, 1],
        [2, 0],
        [3, 3],
    ]
    assert [sorted(round_.channel_memory) for round_ in rounds] == [[0, 1], [0], [0, 1], [0, 1]]
    assert reasons(rounds[1].failures) == {1: "no reply"}
    assert [round_.uplink.encoded for round_ in rounds] == [16, 5, 13, 10]
    assert [round_.downlink.encoded for round_ in rounds] == [16 + 16, 10 + 16, 13 + 16, 10 + 16]
    kept = rounds[2].channel_memory
    assert {client: memory["round"].item() for client, memory in kept.items()} == {0: 3, 1: 3}
    again, resumed = [], {client: dict(memory) for client, memory in kept.items()}
    state = rounds[2].state
    (last,) = run_rounds(
        Labels(), federation(4), delta_exchange(channel, resumed, set(), again), 2, channel,
        after=Progress(3, state, kept),
    )  # fmt: skip
    assert [again[0][client]["probs~"].numel() for client in (0, 1)] == [5, 5]
    assert last.uplink == rounds[3].uplink


def test_what_all_are_sent_is_encoded_once():
    channel = Channel(Float32(), UInt8())
    calls = []

    def exchange(kind, number, messages, expected=None):
        calls.append(messages)
        yield Reply(0, Update({"probs": Labels.probs}, 1), "", SerializedBytes())

    list(run_rounds(Labels(), federation(1), exchange, 2, channel))
    assert calls[0][0]["probs~"] is calls[0][1]["probs~"]


def accept(reply, method=None, channel=PLAIN, memory=None):
    method = method or Labels()
    outcome = accept_reply(reply, method, federation(), method.upload_spec(federation(), 0, 1), channel, memory or {})
    return outcome.reason if isinstance(outcome, Failure) else outcome


def test_a_reply_without_update_is_refused_with_a_reason():
    update = Update({"probs": Labels.probs}, 1)
    assert accept(Reply(0, None, "", BYTES)) == "an empty reply"
    assert accept(Reply(0, None, "gone", BYTES)) == "gone"
    assert accept(Reply(0, update, "half of it failed", BYTES)) == "half of it failed"
    assert accept(Reply(0, update, "", BYTES))[0].examples == 1


def test_what_cannot_be_decoded_is_refused_with_the_reason():
    update = Update({"probs~": torch.zeros(3, dtype=torch.uint8)}, 1)
    reason = accept(Reply(0, update, "", BYTES), channel=Channel(UInt8(), UInt8()))
    assert reason.startswith("sent what cannot be decoded: ")
    assert len(reason) > len("sent what cannot be decoded: ")
    assert "None" not in reason
    assert accept(Reply(0, Update({"x": torch.zeros(1)}, 1), "", BYTES)) == "sent no probs and undeclared x"


def test_more_numbers_than_are_declared_are_not_decoded():
    channel = Channel(UInt8(), UInt8())
    sent = channel.encode_update({"probs": torch.full((3, 2), 0.5)}, {}, {}).tensors
    reason = accept(Reply(0, Update(sent, 1), "", BYTES), channel=channel)
    assert reason.startswith("sent what cannot be decoded: ")
    assert "4" in reason


def test_probs_that_were_rounded_are_made_to_sum_to_one():
    probs = torch.tensor([[0.5, 0.498], [0.25, 0.752]])
    update, encoded = accept(Reply(0, Update({"probs": probs}, 7, {"loss": 2.0}), "", BYTES))
    wanted = probs.double() / probs.double().sum(1, keepdim=True)
    assert torch.equal(update.tensors["probs"], wanted.float())
    assert update.tensors["probs"].dtype == torch.float32
    assert (update.examples, update.metrics) == (7, {"loss": 2.0})
    assert encoded.tensors["probs"] is not update.tensors["probs"]
    assert encoded.traffic.encoded == 16


def test_only_probs_are_made_to_sum_to_one():
    class Both(Labels):
        def upload_spec(self, setup, client, number):
            return {"x": (2,), "probs": (1, 2)}

    tensors = {"x": torch.tensor([3.0, 4.0]), "probs": torch.tensor([[0.5, 0.498]])}
    update, _ = accept(Reply(0, Update(tensors, 1), "", BYTES), Both())
    assert list(update.tensors) == ["x", "probs"]
    assert update.tensors["x"].tolist() == [3.0, 4.0]
    assert update.tensors["probs"].sum().item() == pytest.approx(1.0, abs=1e-7)
    alone, _ = accept(Reply(0, Update({"x": torch.tensor([3.0])}, 1), "", BYTES), Adding())
    assert alone.tensors["x"].tolist() == [3.0]


@pytest.mark.parametrize(
    ("clients", "participation", "expected"),
    [(10, 1.0, 10), (10, 0.3, 3), (10, 0.01, 1), (3, 0.5, 2), (1, 0.1, 1), (20, 0.2, 4), (8, 0.9, 7)],
)
def test_the_number_of_participants_is_rounded_and_at_least_one(clients, participation, expected):
    assert participants(clients, participation) == expected
    chosen = sample(clients, participation, 0, 1)
    assert len(chosen) == len(set(chosen)) == expected
    assert chosen == sorted(chosen)


def test_the_clients_of_a_round_are_the_draw_of_its_name():
    for seed, number in ((0, 1), (0, 2), (5, 1)):
        random = np.random.default_rng(seeds.derive(seed, "participation", number))
        expected = sorted(random.choice(10, size=4, replace=False, shuffle=False).tolist())
        chosen = sample(10, 0.4, seed, number)
        assert chosen == expected
        assert all(type(client) is int for client in chosen)
    assert sample(4, 1.0, 0, 1) == [0, 1, 2, 3]


def test_no_client_is_sampled_twice_in_a_round_and_all_are_sampled():
    draws = [sample(6, 0.5, 1, number) for number in range(1, 41)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert {client for draw in draws for client in draw} == set(range(6))


def test_the_loop_asks_those_who_are_drawn():
    calls = []
    values = dict.fromkeys(range(10), 1.0)
    list(run_rounds(Adding(), federation(3, 0.4, 5), exchange_of(values, calls), 10, PLAIN))
    assert [list(messages) for _, _, messages in calls] == [sample(10, 0.4, 5, number) for number in (1, 2, 3)]
