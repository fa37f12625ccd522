"""What is decoded is what was sent, whoever was away, failed or was refused; and what it weighs."""

from __future__ import annotations

import math

import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.communication import channel, codecs
from fedkd.communication.channel import Channel
from fedkd.core import specs
from fedkd.simulate import rounds
from fedkd.simulate.rounds import Reply, SerializedBytes
from tests.conftest import simulated, tiny

LOSSLESS = "float32:delta=true,coder=zstd"


def codec(text):
    return specs.call("codec", text)


def line(up, down="float32"):
    return Channel(codec(up), codec(down))


class Talking(Algorithm):
    """Clients answer with what they heard, and a part of their own that changes in few rows a round."""

    def initial_state(self, setup):
        return {"probs": table(0), "round": torch.tensor(1)}

    def broadcast(self, setup, state, client):
        return state

    def upload_spec(self, setup, state, client):
        return {"probs": (200, 10)}

    def local_update(self, setup, client, request):
        raise NotImplementedError

    def aggregate(self, setup, state, updates, seed):
        return {"probs": table(int(state["round"])), "round": state["round"] + 1}


def table(number, client=0):
    probs = torch.eye(10)[torch.randint(10, (200,), generator=torch.Generator().manual_seed(5))]
    probs[(3 * number + client) % 200] = torch.eye(10)[(number + client) % 10]
    return probs


class Clients:
    """Their side of an exchange, with memories, as the ClientApp plays it."""

    def __init__(self, line):
        self.line, self.memories, self.heard, self.sizes = line, {}, {}, {}
        self.lost, self.spoiled = set(), set()  # (round, client): never gets there; comes back broken

    def __call__(self, kind, number, requests):
        for client, arrays in requests.items():
            if (number, client) in self.lost:
                continue
            memory = self.memories.get(client, {})
            try:
                down = self.line.hear(arrays, memory)
            except ValueError as error:
                yield Reply(client, None, str(error), SerializedBytes())
                continue
            self.heard[number, client] = down.tensors["probs"]
            up = self.line.answer({"probs": table(number, client)}, arrays, memory)
            self.memories[client] = self.line.memory(number, down, up)
            self.sizes[number, client] = up.load.coded
            sent = {n: t[:-3] for n, t in up.tensors.items()} if (number, client) in self.spoiled else up.tensors
            yield Reply(client, Update(sent, 1), "", SerializedBytes())


@pytest.mark.parametrize("coder", ["none", "range", "zstd"])
def test_a_delta_survives_absence_loss_and_refusal(experiment, coder, monkeypatch):
    setup = prepare_kit(experiment, rounds=8)
    text = f"bits:bits=1,delta=true,coder={coder}"
    clients = Clients(line(text, text))
    clients.lost, clients.spoiled = {(3, 1)}, {(4, 2)}
    monkeypatch.setattr(rounds, "sample", lambda count, share, seed, number: [0, 1, 2] if number != 6 else [0, 2])
    for round_ in rounds.run_rounds(Talking(), setup, clients, 3, clients.line):
        failed = {1} if round_.number == 3 else {2} if round_.number == 4 else set()
        if round_.number == 5:  # the server thinks that client 2 knows nothing, and sends everything
            assert clients.sizes[5, 2] > clients.sizes[5, 0]
        assert set(round_.failures) == failed
        for client, update in round_.updates.items():
            assert torch.equal(update.tensors["probs"], table(round_.number, client))
            assert torch.equal(clients.heard[round_.number, client], table(round_.number - 1))
    assert clients.sizes[2, 0] < clients.sizes[1, 0] / 2


def test_a_client_that_lost_its_memory_fails_once_and_is_then_sent_everything(experiment):
    setup = prepare_kit(experiment, rounds=5)
    clients = Clients(line("float32", "bits:bits=1,delta=true"))
    seen = []
    for round_ in rounds.run_rounds(Talking(), setup, clients, 2, clients.line):
        seen.append(set(round_.failures))
        if round_.number == 2:
            clients.memories.pop(1)
    assert seen == [set(), set(), {1}, set(), set()]
    assert torch.equal(clients.heard[5, 1], table(4))


def test_going_on_from_a_round_is_as_if_it_had_not_stopped(experiment):
    setup = prepare_kit(experiment, rounds=4)
    whole, stopped = (Clients(line("bits:delta=true", "bits:delta=true")) for _ in range(2))
    last = list(rounds.run_rounds(Talking(), setup, whole, 2, whole.line))[-1]
    first = next(rounds.run_rounds(Talking(), setup, stopped, 2, stopped.line))
    more = rounds.run_rounds(
        Talking(), setup, stopped, 2, stopped.line, state=first.state, remembered=first.remembered, start=2
    )
    assert list(more)[-1].up == last.up
    assert stopped.sizes == whole.sizes


def prepare_kit(experiment, **changes):
    import dataclasses

    return dataclasses.replace(experiment.setup, config=tiny(**changes))


def test_lossless_codecs_change_no_bit_of_a_run(tmp_path):
    changes = {
        "algorithm": "ensemble:downlink=labels",
        "compare": "fedavg scaffold",
        "participation": 0.5,
        "clients": 4,
    }
    plain = simulated(tmp_path / "plain", **changes)
    coded = simulated(tmp_path / "coded", **changes, up=LOSSLESS, down=LOSSLESS)
    sizes = {
        "uplink_serialized_bytes",
        "downlink_serialized_bytes",
        "uplink_encoded_bytes",
        "downlink_encoded_bytes",
        "uplink_entropy_bound_bytes",
        "downlink_entropy_bound_bytes",
    }
    for one, other in zip(plain, coded, strict=True):
        assert {k: v for k, v in one.items() if k not in sizes} == {k: v for k, v in other.items() if k not in sizes}
        assert one["uplink_float32_bytes"] == one["uplink_encoded_bytes"]
    assert (tmp_path / "plain/student.safetensors").read_bytes() == (
        tmp_path / "coded/student.safetensors"
    ).read_bytes()


def test_a_run_with_one_bit_labels_weighs_what_it_says(tmp_path):
    row = simulated(tmp_path, algorithm="dsfl", up="bits:bits=1,coder=range", down="uint8", compare="fedavg", rounds=1)
    dsfl, fedavg = row
    assert dsfl["uplink_float32_bytes"] == 3 * 40 * 10 * 4
    assert dsfl["uplink_entropy_bound_bytes"] <= 3 * 40 * 3.33 / 8
    assert dsfl["uplink_encoded_bytes"] < 0.1 * dsfl["uplink_float32_bytes"]
    assert dsfl["uplink_serialized_bytes"] == dsfl["uplink_encoded_bytes"] + 3 * (128 + len("probs~"))
    assert fedavg["uplink_encoded_bytes"] == fedavg["uplink_float32_bytes"], (
        "weights are no soft labels, and go as they are"
    )


def test_what_cannot_be_decoded_is_a_failure_with_a_reason(experiment):
    algorithm, setup = Talking(), experiment.setup
    plain = line("float16")
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 2), torch.full((500,), 255, dtype=torch.uint8)):
        reply = Reply(0, Update({"probs~": wrong}, 1), "", SerializedBytes())
        assert "cannot be decoded" in rounds.accept_reply(
            reply, algorithm, setup, algorithm.initial_state(setup), plain, {}
        )
    huge = plain.answer({"probs": torch.full((40, 10), 0.1)}, {}, {}).tensors
    outcome = rounds.accept_reply(
        Reply(0, Update(huge, 1), "", SerializedBytes()), algorithm, setup, algorithm.initial_state(setup), plain, {}
    )
    assert isinstance(outcome, str)


def test_a_codec_of_labels_takes_logits_as_log_probabilities(generator):
    logits = 3 * torch.randn(30, 10, generator=generator)
    coded = channel.encode(codec("uint8"), {"logits": logits, "round": torch.tensor(3)}, {}, {})
    back = channel.decode(codec("uint8"), coded.tensors, {}).tensors
    assert back["round"] == 3
    assert (back["logits"].softmax(-1) - logits.softmax(-1)).abs().max() < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logits_become_probabilities_at_the_runs_temperature(generator, temperature):
    """What an aggregator makes of them, which divides them by it, is what was coded."""
    logits = 10 * torch.randn(30, 10, generator=generator)
    line = Channel(codec("uint8"), codec("uint8"), temperature)
    sent = line.answer({"logits": logits}, {}, {}).tensors
    back = line.aggregate(sent, {"logits": (30, 10)}, {}).tensors["logits"]
    assert ((back / temperature).softmax(-1) - (logits / temperature).softmax(-1)).abs().max() < 0.01


@pytest.mark.parametrize("up", ["float16", "bfloat16", "uint8", "bits:bits=3,coder=range", "top:k=3,coder=zstd"])
@pytest.mark.parametrize("algorithm", ["dsfl", "kt-pfl", "selective-fd", "density", "fedproto", "scarlet"])
def test_every_codec_carries_every_kind_of_answer(tmp_path, up, algorithm):
    rows = simulated(tmp_path, algorithm=algorithm, up=f"{up}{',' if ':' in up else ':'}delta=true", down=up, rounds=3)
    assert all(not row["failures"] for row in rows)


def test_the_number_of_the_turn_is_weighed():
    plain, remembering = (Channel(codec("float32"), codec(text)) for text in ("float32", LOSSLESS))
    weighed = [one.broadcast({"round": torch.tensor(3)}, {}, {}).load.coded for one in (plain, remembering)]
    assert weighed == [8, 16]


def test_what_all_clients_are_sent_is_coded_once(generator):
    counting, calls = codec("float16"), []

    class Counting(type(counting)):
        def encode(self, values, reference):
            calls.append(1)
            return super().encode(values, reference)

    both, made = Channel(Counting(), Counting()), {}
    shared = {"w": torch.randn(5, generator=generator)}
    packed = [both.broadcast(dict(shared), {}, made).tensors["w~"] for _ in range(3)]
    assert len(calls) == 1
    assert packed[0] is packed[2]


def test_break_even():
    assert int(channel.break_even(78_042, 32, 10, 32)) == 7_804
    assert channel.break_even(78_042, 32, 10, math.log2(10) / 10) == pytest.approx(78_042 * 32 / math.log2(10))
    cost = [codecs.Float32().encode(torch.zeros(samples, 10), None).nbytes for samples in (7_804, 7_805)]
    assert cost[0] <= codecs.Float32().encode(torch.zeros(78_042), None).nbytes < cost[1]
