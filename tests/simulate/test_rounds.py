from __future__ import annotations

import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.communication.channel import Channel
from fedkd.core.communication.codecs import Float32
from fedkd.core.communication.ledger import SerializedBytes
from fedkd.core.communication.replies import Reply
from fedkd.core.communication.validation import validate_update
from fedkd.core.errors import RunError, last_line
from fedkd.core.tensors import Int64
from fedkd.simulate.rounds import run_rounds, sample
from tests.conftest import reasons, tiny

PLAIN = Channel(Float32(), Float32())


def test_participants_are_sampled_without_replacement_by_seed_and_round():
    first = sample(1000, 0.1, seed=0, number=1)
    assert len(set(first)) == 100
    assert first == sorted(first) == sample(1000, 0.1, seed=0, number=1)
    assert first != sample(1000, 0.1, seed=0, number=2)
    assert first != sample(1000, 0.1, seed=1, number=1)
    assert sample(20, 1.0, 0, 1) == list(range(20))
    assert len(sample(20, 0.001, 0, 1)) == 1


def test_all_clients_are_sampled_about_equally_often():
    counts = torch.bincount(torch.tensor([c for n in range(400) for c in sample(20, 0.25, 0, n)]), minlength=20)
    assert counts.sum() == 400 * 5
    assert counts.min() > 65  # mean 100, standard deviation 8.7
    assert counts.max() < 135


PROBS = torch.full((4, 5), 0.2)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (Update({}, 3), "no probs"),
        (Update({"probs": PROBS, "labels": PROBS}, 3), "undeclared labels"),
        (Update({"probs": PROBS[:2]}, 3), "shape"),
        (Update({"probs": PROBS * torch.nan}, 3), "not finite"),
        (Update({"probs": PROBS * 2}, 3), "not distributions"),
        (Update({"probs": PROBS - torch.tensor([0.4, -0.1, -0.1, -0.1, -0.1])}, 3), "not distributions"),
        (Update({"probs": PROBS}, 0), "no examples"),
        (Update({"logits": PROBS * 1e7}, 3), "larger than 1,000,000"),
        (Update({"probs": PROBS.double()}, 3), "of type torch.float64 instead of torch.float32"),
        (Update({"probs": torch.ones(4, 5, dtype=torch.int64)}, 3), "of type torch.int64 instead of torch.float32"),
        (Update({"probs": PROBS}, 3, {"loss": float("inf")}), "not finite"),
        (Update({"probs": PROBS}, 3, {"loss": 1.7e308}), "not finite"),  # two of them would sum to infinity
        (Update({"probs": PROBS}, 3, {"loss": 1.0}), ""),
    ],
)
def test_the_server_checks_every_reply(update, expected):
    found = validate_update(update, {"logits" if "logits" in update.tensors else "probs": (4, 5)})
    assert expected in found
    assert bool(found) == bool(expected)


def test_a_failure_without_words_has_a_line():
    assert last_line("") == last_line(" \n") == "no reason given"
    assert last_line("a\nb: c.\n") == "b: c"


def test_integers_are_declared_and_extents_may_be_bounded():
    declared = {"counts": Int64((3,)), "probs": (-4, 5)}
    counts = torch.tensor([1, 2, 3])
    assert validate_update(Update({"counts": counts, "probs": PROBS[:2]}, 3), declared) == ""
    assert validate_update(Update({"counts": counts, "probs": PROBS[:0]}, 3), declared) == ""
    assert "torch.int64" in validate_update(Update({"counts": counts.float(), "probs": PROBS}, 3), declared)
    assert "shape" in validate_update(Update({"counts": counts, "probs": PROBS.repeat(2, 1)}, 3), declared)


class Counting(Algorithm):
    """Adds up the updates, in the order in which it receives them."""

    def initial_state(self, setup):
        return {"sum": torch.zeros(1)}

    def upload_spec(self, setup, client, number):
        return {"x": (1,)}

    def local_update(self, setup, client, request):
        raise NotImplementedError

    def aggregate(self, setup, state, updates, seed):
        assert list(updates) == sorted(updates)
        return {"sum": state["sum"] + sum(update.tensors["x"] for update in updates.values())}


def replies(values):
    """An exchange with given updates, whose replies arrive in reversed order."""

    def exchange(kind, number, requests, expected=None):
        for client in reversed(requests):
            value = values.get(client)
            if isinstance(value, str):
                yield Reply(client, None, value, SerializedBytes(1, 0, 1, 0))
            elif value is not None:
                yield Reply(client, Update({"x": torch.tensor([value])}, 1), "", SerializedBytes(1, 2, 3, 4))

    return exchange


@pytest.fixture
def setup(experiment):
    return experiment.setup


def test_failed_bad_and_silent_clients_are_survived_and_named(setup):
    exchange = replies({0: 1.0, 1: "it fell over", 2: float("nan")})
    rounds = list(run_rounds(Counting(), setup, exchange, 4, PLAIN))
    assert [round_.number for round_ in rounds] == [1, 2]
    assert rounds[-1].state["sum"].item() == 2.0
    assert [(failure.client, failure.cause) for failure in rounds[0].failures] == [
        (1, "error"),
        (2, "refused"),
        (3, "no reply"),
    ]
    assert reasons(rounds[0].failures)[1] == "it fell over"
    assert "finite" in reasons(rounds[0].failures)[2]
    assert rounds[0].serialized == SerializedBytes(3, 4, 7, 8)


def test_a_round_without_any_update_ends_the_run(setup):
    with pytest.raises(RunError, match="Round 1: none of 2 clients sent a usable update; client 0: gone"):
        list(run_rounds(Counting(), setup, replies({0: "gone"}), 2, PLAIN))


def test_stopping_early_is_a_break_and_resuming_is_a_state(setup):
    exchange = replies({0: 1.0, 1: 2.0})
    first = next(run_rounds(Counting(), setup, exchange, 2, PLAIN))
    (last,) = run_rounds(Counting(), setup, exchange, 2, PLAIN, after=first)
    assert last.state["sum"].item() == 6.0
    assert tiny().rounds == 2
