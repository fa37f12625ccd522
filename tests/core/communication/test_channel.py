"""What is decoded is what was sent, also after absence, failures and refusals; and its bytes."""

from __future__ import annotations

import math

import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.core import specs
from fedkd.core.communication import channel, codecs, ledger
from fedkd.core.communication.channel import Channel
from fedkd.core.communication.ledger import SerializedBytes
from fedkd.core.communication.replies import Reply
from fedkd.simulate import rounds
from tests.conftest import reasons, simulated, slow, tiny

LOSSLESS = "float32:delta=true,coder=zstd"


def codec(text):
    return specs.call("codec", text)


def channel_of(uplink, downlink="float32"):
    return Channel(codec(uplink), codec(downlink))


class FewChanges(Algorithm):
    """Server and clients send a table of which few rows change per round."""

    def initial_state(self, setup):
        return {"probs": table(0), "round": torch.tensor(1)}

    def broadcast(self, setup, state, client):
        return state

    def upload_spec(self, setup, client, number):
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
    """The clients' side of an exchange, with memories, as in the ClientApp."""

    def __init__(self, channel):
        self.channel, self.memories, self.received, self.sizes = channel, {}, {}, {}
        self.lost, self.spoiled = set(), set()  # (round, client): the message is lost; the update arrives broken

    def __call__(self, kind, number, requests, expected=None):
        for client, arrays in requests.items():
            if (number, client) in self.lost:
                continue
            memory = self.memories.get(client, {})
            try:
                downlink = self.channel.decode_message(arrays, memory)
            except ValueError as error:
                yield Reply(client, None, str(error), SerializedBytes())
                continue
            self.received[number, client] = downlink.tensors["probs"]
            uplink = self.channel.encode_update({"probs": table(number, client)}, arrays, memory)
            self.memories[client] = self.channel.new_memory(number, downlink, uplink)
            self.sizes[number, client] = uplink.traffic.encoded
            sent = (
                {n: t[:-3] for n, t in uplink.tensors.items()} if (number, client) in self.spoiled else uplink.tensors
            )
            yield Reply(client, Update(sent, 1), "", SerializedBytes())


@pytest.mark.parametrize("coder", ["none", "range", "zstd"])
def test_a_delta_survives_absence_loss_and_refusal(experiment, coder, monkeypatch):
    setup = setup_with(experiment, rounds=8)
    text = f"bits:bits=1,delta=true,coder={coder}"
    clients = Clients(channel_of(text, text))
    clients.lost, clients.spoiled = {(3, 1)}, {(4, 2)}
    monkeypatch.setattr(rounds, "sample", lambda count, share, seed, number, *_: [0, 1, 2] if number != 6 else [0, 2])
    for round_ in rounds.run_rounds(FewChanges(), setup, clients, 3, clients.channel):
        failed = {1} if round_.number == 3 else {2} if round_.number == 4 else set()
        if round_.number == 5:  # the server assumes that client 2 remembers nothing, and sends everything
            assert clients.sizes[5, 2] > clients.sizes[5, 0]
        assert set(reasons(round_.failures)) == failed
        for client, update in round_.updates.items():
            assert torch.equal(update.tensors["probs"], table(round_.number, client))
            assert torch.equal(clients.received[round_.number, client], table(round_.number - 1))
    assert clients.sizes[2, 0] < clients.sizes[1, 0] / 2


def test_a_client_that_lost_its_memory_fails_once_and_then_receives_everything(experiment):
    setup = setup_with(experiment, rounds=5)
    clients = Clients(channel_of("float32", "bits:bits=1,delta=true"))
    seen = []
    for round_ in rounds.run_rounds(FewChanges(), setup, clients, 2, clients.channel):
        seen.append(set(reasons(round_.failures)))
        if round_.number == 2:
            clients.memories.pop(1)
    assert seen == [set(), set(), {1}, set(), set()]
    assert torch.equal(clients.received[5, 1], table(4))


def test_a_continued_run_equals_an_uninterrupted_one(experiment):
    setup = setup_with(experiment, rounds=4)
    whole, stopped = (Clients(channel_of("bits:delta=true", "bits:delta=true")) for _ in range(2))
    last = list(rounds.run_rounds(FewChanges(), setup, whole, 2, whole.channel))[-1]
    first = next(rounds.run_rounds(FewChanges(), setup, stopped, 2, stopped.channel))
    more = rounds.run_rounds(
        FewChanges(),
        setup,
        stopped,
        2,
        stopped.channel,
        after=first,
    )
    assert list(more)[-1].uplink == last.uplink
    assert stopped.sizes == whole.sizes


def setup_with(experiment, **changes):
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
    coded = simulated(tmp_path / "coded", **changes, uplink_codec=LOSSLESS, downlink_codec=LOSSLESS)
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


def test_the_bytes_of_a_run_with_one_bit_labels(tmp_path):
    codecs = {"uplink_codec": "bits:bits=1,coder=range", "downlink_codec": "uint8"}
    dsfl, fedavg = simulated(tmp_path, algorithm="dsfl", compare="fedavg", rounds=1, **codecs)
    assert dsfl["uplink_float32_bytes"] == 3 * 40 * 10 * 4
    assert dsfl["uplink_entropy_bound_bytes"] <= 3 * 40 * 3.33 / 8
    assert dsfl["uplink_encoded_bytes"] < 0.1 * dsfl["uplink_float32_bytes"]
    assert dsfl["uplink_serialized_bytes"] == dsfl["uplink_encoded_bytes"] + 3 * (128 + len("probs~"))
    assert fedavg["uplink_encoded_bytes"] == fedavg["uplink_float32_bytes"], (
        "weights are no soft labels, so they are not encoded"
    )


def test_what_cannot_be_decoded_is_a_failure_with_a_reason(experiment):
    algorithm, setup = FewChanges(), experiment.setup
    plain = channel_of("float16")
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 2), torch.full((500,), 255, dtype=torch.uint8)):
        reply = Reply(0, Update({"probs~": wrong}, 1), "", SerializedBytes())
        outcome = rounds.accept_reply(reply, algorithm, setup, algorithm.upload_spec(setup, 0, 1), plain, {})
        assert "cannot be decoded" in outcome.reason
    huge = plain.encode_update({"probs": torch.full((40, 10), 0.1)}, {}, {}).tensors
    outcome = rounds.accept_reply(
        Reply(0, Update(huge, 1), "", SerializedBytes()),
        algorithm,
        setup,
        algorithm.upload_spec(setup, 0, 1),
        plain,
        {},
    )
    assert outcome.cause == "refused"


def test_a_codec_of_labels_takes_logits_as_log_probabilities(generator):
    logits = 3 * torch.randn(30, 10, generator=generator)
    coded = channel.encode(codec("uint8"), {"logits": logits, "round": torch.tensor(3)}, {}, {})
    back = channel.decode(codec("uint8"), coded.tensors, {}).tensors
    assert back["round"] == 3
    assert (back["logits"].softmax(-1) - logits.softmax(-1)).abs().max() < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logits_become_probabilities_at_the_runs_temperature(generator, temperature):
    """The probabilities at T after decoding are those that were encoded."""
    logits = 10 * torch.randn(30, 10, generator=generator)
    both = Channel(codec("uint8"), codec("uint8"), temperature)
    sent = both.encode_update({"logits": logits}, {}, {}).tensors
    back = both.decode_update(sent, {"logits": (30, 10)}, {}).tensors["logits"]
    assert ((back / temperature).softmax(-1) - (logits / temperature).softmax(-1)).abs().max() < 0.01


CODECS = ["float16", "bfloat16", "uint8", "bits:bits=3,coder=range", "top:k=3,coder=zstd"]
KINDS = ["dsfl", "kt-pfl", "selective-fd", "density", "fedproto", "scarlet"]


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [  # each codec with two or three kinds, each kind with two or three codecs; the other pairs are slow
        slow(text, algorithm) if (row + column) % 2 else (text, algorithm)
        for row, text in enumerate(CODECS)
        for column, algorithm in enumerate(KINDS)
    ],
)
def test_every_codec_works_with_every_kind_of_update(tmp_path, text, algorithm):
    delta = f"{text}{',' if ':' in text else ':'}delta=true"
    rows = simulated(tmp_path, algorithm=algorithm, uplink_codec=delta, downlink_codec=text, rounds=3)
    assert all(not row["failures"] for row in rows)


def test_the_number_of_the_last_accepted_round_is_counted():
    plain, with_memory = (Channel(codec("float32"), codec(text)) for text in ("float32", LOSSLESS))
    encoded = [one.encode_message({"round": torch.tensor(3)}, {}, {}) for one in (plain, with_memory)]
    assert [one.traffic.encoded for one in encoded] == [8, 16]


def test_what_all_clients_receive_is_encoded_once(generator):
    counting, calls = codec("float16"), []

    class Counting(type(counting)):
        def encode(self, values, reference):
            calls.append(1)
            return super().encode(values, reference)

    both, cache = Channel(Counting(), Counting()), {}
    shared = {"w": torch.randn(5, generator=generator)}
    packed = [both.encode_message(dict(shared), {}, cache).tensors["w~"] for _ in range(3)]
    assert len(calls) == 1
    assert packed[0] is packed[2]


def test_break_even():
    assert int(ledger.break_even(78_042, 32, 10, 32)) == 7_804
    assert ledger.break_even(78_042, 32, 10, math.log2(10) / 10) == pytest.approx(78_042 * 32 / math.log2(10))
    cost = [codecs.Float32().encode(torch.zeros(samples, 10), None).nbytes for samples in (7_804, 7_805)]
    assert cost[0] <= codecs.Float32().encode(torch.zeros(78_042), None).nbytes < cost[1]
