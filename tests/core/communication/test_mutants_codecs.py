"""Codecs and coders at their limits, and the reasons they give, word for word."""

from __future__ import annotations

import re
from io import BytesIO

import numpy as np
import pytest
import torch
import zstandard

from fedkd.core.communication import codecs, entropy
from fedkd.core.communication.codecs import CLASSES, Bits, Float16, Float32, Top, UInt8


def wire(*numbers, body=b""):
    head = b"".join(entropy.number(n) for n in numbers)
    return torch.frombuffer(bytearray(head + body), dtype=torch.uint8)


def is_a_clause(error):
    """Whether the reason is one clause in lower case, fit to follow a colon."""
    return re.fullmatch(r"[a-z](.*[^.])?", str(error)) is not None


@pytest.mark.parametrize(
    ("codec", "sent"),
    [
        (Float16(), torch.zeros(3)),  # no bytes
        (Float16(), torch.zeros(1, 3, dtype=torch.uint8)),  # no row
        (UInt8(delta=True), wire(1, 1, 2)),  # a delta, of nothing
        (UInt8(), wire(0, 1, 2, body=b"\x01\x02")),  # the largest level is not 255
        (Bits(bits=2), wire(0, 1, 2, body=b"\x00")),  # levels that do not sum to 3
        (Top(k=2), wire(0, 1, 4, body=b"\x50\x01\x01")),  # classes that do not ascend
        (UInt8(), wire(2, 1, 2)),  # neither a delta nor none
        (UInt8(), wire(0, 17, *[1] * 17, body=b"\xff")),  # too many dimensions
        (UInt8(), wire(0, 1, 100)),  # too many numbers
        (Float16(), wire(0, 3, 0, 2**31, 2**31)),  # none, but of extents that overflow
        (UInt8(), wire(0, 1, 2, body=b"\xff")),  # cut short
        (UInt8(), wire(0, 1, 2, body=b"\xff\x01\x01")),  # too long
        (Bits(), wire(0, 1, 3, body=b"\xc0")),  # the fourth of three classes
        (UInt8(coder="zstd"), wire(0, 1, 2, body=b"nothing")),  # no frame
        (UInt8(coder="zstd"), wire(0, 1, 2, body=zstandard.ZstdCompressor().compress(bytes(7)))),  # too large a frame
        (UInt8(coder="range"), wire(0, 1, 2, 3)),  # a symbol that comes more often than there are symbols
        (UInt8(coder="range"), wire(0, 1, 2, 1, 1, 0)),  # no words of the range code
        (UInt8(coder="range"), wire(0, 1, 2, 1, 0, 253, 1, 1, body=b"\xff" * 4)),  # words that make other symbols
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_clause(codec, sent):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its message is checked below
        codec.decode(sent, None, 50)
    assert is_a_clause(caught.value), caught.value


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Float32(coder="range"),
        lambda: UInt8().encode(torch.tensor([[0.5, 0.4]]), None),
        lambda: Top(k=3).encode(torch.tensor([[0.5, 0.25, 0.25]]), None),
        lambda: UInt8().encode(torch.zeros(1, CLASSES + 1), None),
        lambda: entropy.read_number(BytesIO(b"\xff" * 8 + b"\x01")),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_clause(wrong):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its message is checked below
        wrong()
    assert is_a_clause(caught.value), caught.value


@pytest.mark.parametrize(("value", "expected"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_numbers_are_leb128(value, expected):
    assert entropy.number(value) == expected
    assert entropy.read_number(BytesIO(expected)) == value


def test_a_number_has_at_most_eight_bytes():
    assert entropy.read_number(BytesIO(b"\xff" * 7 + b"\x7f")) == 2**56 - 1
    with pytest.raises(ValueError, match=r"^[a-z]"):
        entropy.read_number(BytesIO(b"\xff" * 8 + b"\x01"))


def test_the_most_dimensions_and_the_most_classes_pass():
    values = torch.ones([1] * 15 + [2])
    assert torch.equal(Float16().decode(Float16().encode(values, None), None, 2), values)
    flat = torch.full((1, CLASSES), 1 / CLASSES)
    assert torch.equal(UInt8().decode(UInt8().encode(flat, None), None, CLASSES), flat)


def test_a_tensor_without_numbers_may_be_wide():
    assert Float16().decode(wire(0, 3, 0, 2**31, 2**30), None, 50).shape == (0, 2**31, 2**30)


def test_of_equal_remainders_the_first_go_up():
    flat = torch.full((2, 20), 0.05)
    expected = torch.tensor([1.0] * 3 + [0.0] * 17) / 3
    assert torch.equal(Bits(bits=2).decode(Bits(bits=2).encode(flat, None), None, 40), expected.expand(2, 20))


@pytest.mark.parametrize("width", [2, 3, 5, 10, 17, 40])
def test_the_largest_are_near_and_never_below_the_others(width):
    random = torch.rand(7, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    rows = torch.cat([torch.ones(2, width), random, 1 + 1e-3 * random])
    probs = (rows / rows.sum(1, keepdim=True)).float()
    for k in range(1, width):
        decoded = Top(k=k).decode(Top(k=k).encode(probs, None), None, probs.numel())
        top, rest = decoded.sort(1, descending=True).values.split([k, width - k], 1)
        assert torch.allclose(decoded.sum(1), torch.ones(len(probs)))
        assert torch.allclose(rest, rest[:, :1].expand_as(rest))
        largest = probs.topk(k).values
        assert (top - largest).abs().max() < 2 / 255
        assert (top[:, -1:] >= rest - 1e-7).all()


@pytest.mark.parametrize("codec", [Top(k=2), Top(k=5), Bits(bits=3), UInt8()])
def test_rows_are_encoded_each_by_itself(codec):
    logits = torch.randn(60, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probs = (logits * torch.linspace(0.0, 0.3, 60, dtype=torch.float64)[:, None]).softmax(1).float()  # near uniform
    together = codec.decode(codec.encode(probs, None), None, probs.numel())
    for row, decoded in zip(probs, together, strict=True):
        assert torch.equal(codec.decode(codec.encode(row, None), None, 8), decoded)


def test_symbols_are_of_sixteen_bits():
    same = np.full((4, 1), 7, np.uint16)
    mixed = np.array([[3], [1], [3], [0]], np.uint16)
    for symbols in (same, mixed):
        read = entropy.read("range", BytesIO(entropy.write("range", [(symbols, 9)])), 4, 9)
        assert read.dtype == np.uint16
        assert read.tolist() == symbols[:, 0].tolist()


def test_the_nearest_integers_are_integers():
    cells = np.array([[1.5, 1.5]])
    assert codecs._nearest(cells, 3).tolist() == [[2, 1]]
    assert codecs._nearest(cells, 3).dtype == np.int64
