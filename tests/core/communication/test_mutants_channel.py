"""The channel: two ends that stay in step, byte by byte."""

from __future__ import annotations

import pytest
import torch

from fedkd.core.communication import channel as channels
from fedkd.core.communication.channel import Channel, decode, encode
from fedkd.core.communication.codecs import Bits, Float16, Float32, UInt8
from fedkd.core.communication.ledger import Traffic

PROBS = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.0, 1.0]])
OTHER = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.6, 0.4]])  # one row differs
WEIGHT = torch.arange(5.0)
SHAPES = {"probs": (3, 2), "x": (5,)}
DELTA = Channel(UInt8(delta=True), Bits(bits=2, delta=True))  # up in 255ths, down in thirds
HEAD = 3 + 1  # of a coded tensor [3, 2]: kind, dimensions and extents


def down(probs):
    """The nearest thirds."""
    return (probs * 3).round() / 3


def up(probs):
    """The nearest 255ths of the largest, as a distribution."""
    levels = (probs / probs.amax(1, keepdim=True) * 255).round()
    return levels / levels.sum(1, keepdim=True)


def round_trip(channel, message, update, number, server, client):
    """One round of one client: what both ends have read, and their new memories."""
    sent = channel.encode_message(message, server, {})
    heard = channel.decode_message(sent.tensors, client)
    answer = channel.encode_update(update, sent.tensors, client)
    got = channel.decode_update(answer.tensors, SHAPES, server)
    memories = channel.new_memory(number, sent, got), channel.new_memory(number, heard, answer)
    return sent, heard, answer, got, memories


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_both_ends_read_the_same_and_remember_the_same():
    message, update = {"probs": PROBS, "x": WEIGHT}, {"x": WEIGHT + 1, "probs": OTHER}
    sent, heard, answer, got, (server, client) = round_trip(DELTA, message, update, 7, {}, {})
    assert list(sent.tensors) == ["probs~", "x", "last"]
    assert sent.tensors["last"].item() == 0
    assert list(heard.tensors) == ["probs", "x"]
    assert torch.allclose(heard.tensors["probs"], down(PROBS))
    assert heard.tensors["x"] is WEIGHT
    assert list(answer.tensors) == ["x", "probs~"]
    assert torch.allclose(got.tensors["probs"], up(OTHER))
    assert got.tensors["x"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert same(server, client)
    assert list(server) == ["round", "downlink/probs", "uplink/probs"]
    assert server["round"].item() == 7
    assert torch.equal(server["downlink/probs"], heard.tensors["probs"])
    assert torch.equal(server["uplink/probs"], got.tensors["probs"])


def test_the_second_time_only_what_changed_is_sent():
    message, update = {"probs": PROBS}, {"probs": PROBS}
    first, _, first_up, _, (server, client) = round_trip(DELTA, message, update, 1, {}, {})
    sent, heard, answer, got, (server, client) = round_trip(
        DELTA, {"probs": OTHER}, {"probs": OTHER}, 2, server, client
    )
    assert sent.tensors["last"].item() == 1
    assert first.tensors["probs~"].numel() == HEAD + 2  # 6 numbers of 2 bits
    assert sent.tensors["probs~"].numel() == HEAD + 1 + 1  # a bitmap, and 2 numbers of 2 bits
    assert first_up.tensors["probs~"].numel() == HEAD + 6
    assert answer.tensors["probs~"].numel() == HEAD + 1 + 2
    assert torch.allclose(heard.tensors["probs"], down(OTHER))
    assert torch.allclose(got.tensors["probs"], up(OTHER))
    assert same(server, client)
    assert got.traffic == answer.traffic
    assert sent.traffic == Traffic(24, HEAD + 2 + 8, pytest.approx((3 * 0.9182958 + 2) / 8 + 8))


@pytest.mark.parametrize("lost", ["all of it", "a round"])
def test_a_client_of_another_memory_refuses_a_delta_and_sends_all(lost):
    message = {"probs": PROBS}
    *_, (server, client) = round_trip(DELTA, message, message, 1, {}, {})
    stale = {} if lost == "all of it" else {**client, "round": torch.tensor(0)}
    sent = DELTA.encode_message(message, server, {})
    with pytest.raises(ValueError, match=r"^[a-z].*tensor"):
        DELTA.decode_message(sent.tensors, stale)
    assert DELTA.encode_update(message, sent.tensors, stale).tensors["probs~"].numel() == HEAD + 6
    assert DELTA.encode_update(message, sent.tensors, client).tensors["probs~"].numel() == HEAD + 1
    without_number = {name: tensor for name, tensor in sent.tensors.items() if name != "last"}
    assert DELTA.encode_update(message, without_number, client).tensors["probs~"].numel() == HEAD + 6
    without_round = {name: tensor for name, tensor in client.items() if name != "round"}
    assert DELTA.encode_update(message, sent.tensors, without_round).tensors["probs~"].numel() == HEAD + 6


def test_without_deltas_nothing_is_remembered_or_added():
    channel = Channel(UInt8(), Bits(bits=2))
    sent, heard, _, got, memories = round_trip(channel, {"probs": PROBS}, {"probs": PROBS}, 1, {}, {})
    assert list(sent.tensors) == ["probs~"]
    assert sent.added_bytes == 0
    assert memories == ({}, {})
    assert (heard.decoded, got.decoded) == ({}, {})


@pytest.mark.parametrize("direction", ["up", "down"])
def test_one_direction_with_deltas_is_enough_for_a_memory(direction):
    channel = Channel(UInt8(delta=direction == "up"), Bits(bits=2, delta=direction == "down"))
    sent, *_, memories = round_trip(channel, {"probs": PROBS}, {"probs": PROBS}, 3, {}, {})
    assert sent.added_bytes == 8
    names = {"round", "uplink/probs" if direction == "up" else "downlink/probs"}
    assert set(memories[0]) == set(memories[1]) == names


def test_logits_are_sent_as_probabilities_at_the_temperature_of_the_run():
    channel = Channel(UInt8(), Bits(bits=2), temperature=2.0)
    logits = torch.tensor([[0.0, 2.4], [1.0, 1.0], [50.0, 0.0]])
    shapes = {"logits": (3, 2)}
    probs = (logits / 2).softmax(-1)
    heard = channel.decode_message(channel.encode_message({"logits": logits}, {}, {}).tensors, {})
    assert torch.allclose(heard.tensors["logits"], 2 * _third(probs).clamp_min(1e-4).log())
    answer = channel.encode_update({"logits": logits}, {}, {})
    got = channel.decode_update(answer.tensors, shapes, {})
    assert torch.allclose(got.tensors["logits"], 2 * up(probs).clamp_min(1e-4).log())
    assert got.tensors["logits"][2, 1].item() == pytest.approx(2 * -9.210340)


def _third(probs):
    """The nearest multiples of a third that sum to one, of two classes: the larger remainder, or the first, goes up."""
    first = torch.where((probs[:, 0] * 3) % 1 >= 0.5, (probs[:, 0] * 3).ceil(), (probs[:, 0] * 3).floor()) / 3
    return torch.stack([first, 1 - first], 1)


def test_the_default_temperature_is_one():
    logits = torch.tensor([[0.0, 4.0]])
    sent = encode(UInt8(), {"logits": logits}, {}, {})
    assert torch.allclose(sent.encoded["logits"].values, logits.softmax(-1))
    got = decode(UInt8(), sent.tensors, {})
    assert torch.allclose(got.tensors["logits"], up(logits.softmax(-1)).clamp_min(1e-4).log())


def test_probs_and_a_codec_of_floats_stay_what_they_are():
    assert encode(UInt8(), {"probs": PROBS}, {}, {}, 5.0).encoded["probs"].values is PROBS
    logits = torch.tensor([[0.5, -4.0]])
    sent = encode(Float16(), {"logits": logits}, {}, {}, 5.0)
    assert decode(Float16(), sent.tensors, {}, None, 5.0).tensors["logits"].tolist() == logits.tolist()


def test_a_codec_of_floats_takes_all_floats_and_no_integers():
    tensors = {
        "count": torch.tensor([1, 2, 3]),
        "x": WEIGHT,
        "bytes": torch.zeros(2, dtype=torch.uint8),
        "probs": PROBS,
    }
    sent = encode(Float16(), tensors, {}, {})
    assert list(sent.tensors) == ["count", "x~", "bytes", "probs~"]
    assert sent.plain_bytes == 3 * 8 + 2
    got = decode(Float16(), sent.tensors, {})
    assert list(got.tensors) == ["count", "x", "bytes", "probs"]
    assert got.plain_bytes == 3 * 8 + 2
    assert got.tensors["x"].tolist() == WEIGHT.tolist()
    assert sent.tensors["count"] is tensors["count"]


def test_exact_floats_go_under_their_own_names():
    sent = encode(Float32(), {"x": WEIGHT}, {}, {})
    assert list(sent.tensors) == ["x"]
    assert sent.tensors["x"] is WEIGHT
    assert sent.plain_bytes == 0
    assert sent.traffic == Traffic(20, 20, 20.0)


def test_what_is_the_same_for_all_clients_is_encoded_once():
    cache = {}
    channel = Channel(UInt8(delta=True), Bits(bits=2, delta=True))
    one = channel.encode_message({"probs": PROBS}, {}, cache)
    two = channel.encode_message({"probs": PROBS}, {}, cache)
    assert two.encoded["probs"] is one.encoded["probs"]
    kept, part = cache[id(PROBS)]
    assert kept is PROBS
    assert part is one.encoded["probs"]
    memory = {"round": torch.tensor(1), "downlink/probs": down(PROBS)}
    three = channel.encode_message({"probs": PROBS}, memory, cache)
    assert three.encoded["probs"] is not part  # who remembers it is sent a delta
    assert three.encoded["probs"].reference is memory["downlink/probs"]
    assert cache[id(PROBS)][1] is part
    fresh = {}
    channel.encode_message({"probs": PROBS}, memory, fresh)
    assert fresh == {}


def test_the_receiver_has_limits(monkeypatch):
    sent = encode(UInt8(), {"probs": PROBS}, {}, {}).tensors
    assert torch.allclose(decode(UInt8(), sent, {}, {"probs": (3, 2)}).tensors["probs"], up(PROBS))
    assert torch.allclose(decode(UInt8(), sent, {}, {"probs": (-6, 1)}).tensors["probs"], up(PROBS))
    for shapes, most in (({"probs": (5,)}, 5), ({"probs": (-5,)}, 5), ({"other": (9,)}, 0)):
        with pytest.raises(ValueError, match=rf"^[a-z].*\b{most}\b"):
            decode(UInt8(), sent, {}, shapes)
    monkeypatch.setattr(channels, "MAX_NUMBERS", 5)
    with pytest.raises(ValueError, match=r"^[a-z].*\b5\b"):
        Channel(UInt8(), UInt8()).decode_message(sent, {})


def test_an_update_may_be_no_larger_than_declared():
    answer = DELTA.encode_update({"probs": PROBS}, {}, {}).tensors
    assert torch.allclose(DELTA.decode_update(answer, {"probs": (3, 2)}, {}).tensors["probs"], up(PROBS))
    with pytest.raises(ValueError, match=r"^[a-z].*\b5\b"):
        DELTA.decode_update(answer, {"probs": (5, 1)}, {})


def test_one_number_of_a_tensor_that_was_not_declared_is_too_many():
    sent = encode(UInt8(), {"probs": torch.ones(1, 1)}, {}, {}).tensors
    with pytest.raises(ValueError, match=r"^[a-z].*\b0\b"):
        decode(UInt8(), sent, {}, {})


def test_what_is_decoded_is_kept_for_deltas_only():
    sent = encode(Bits(bits=2, delta=True), {"probs": PROBS}, {}, {})
    assert torch.allclose(sent.encoded["probs"].decoded, down(PROBS))
    got = decode(Bits(bits=2, delta=True), sent.tensors, {})
    assert got.encoded["probs"].decoded is got.encoded["probs"].values
    assert got.encoded["probs"].encoding is sent.tensors["probs~"]
    assert got.traffic.encoded == sent.traffic.encoded == HEAD + 2
    plain = encode(Bits(bits=2), {"probs": PROBS}, {}, {})
    assert plain.encoded["probs"].decoded is None
    assert decode(Bits(bits=2), plain.tensors, {}).encoded["probs"].decoded is None
