"""The laws of every codec, brute force, published sizes, and what comes from somebody who means no good."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.communication import codecs, entropy
from fedkd.core.errors import UsageError

FLOATS = ["float32", "float16", "bfloat16"]
LABELS = ["uint8", "bits", "bits:bits=2", "bits:bits=3", "bits:bits=8", "top", "top:k=3"]
EVERY = [(name, coder) for name in LABELS for coder in ("none", "zstd", "range")]
EVERY += [(name, coder) for name in FLOATS for coder in ("none", "zstd")]
EXTREMES = [0.0, -0.0, 1e-40, 6e-8, 6.1e-5, 65504.0, 65520.0, -7e4, 3.3961775e38, math.inf, -math.inf, math.nan]


def make(name: str, coder: str = "none", delta: bool = False) -> codecs.Codec:
    return specs.call("codec", f"{name}{',' if ':' in name else ':'}coder={coder},delta={delta}")


def probabilities(seed: int, *shape: int) -> torch.Tensor:
    """Rows from flat to sharp, and some where entries are equal."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (4 * torch.rand(*shape[:-1], 1, generator=generator) - 2)
    logits = scale * torch.randn(*shape, generator=generator)
    rounded = torch.rand(*shape[:-1], 1, generator=generator) < 0.3
    return torch.where(rounded, logits.round(), logits).double().softmax(-1).float()


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Of all sizes, extremes included."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(shape, generator=generator) * 60 - 30)
    values = sizes * torch.randn(shape, generator=generator)
    chosen = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, values)


def draw(codec: codecs.Codec, seed: int, *shape: int) -> torch.Tensor:
    return (probabilities if codec.labels else numbers)(seed, *shape)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether every bit agrees, NaN and the sign of zero included."""
    bits = (left.view(torch.int32), right.view(torch.int32)) if left.dtype == right.dtype == torch.float32 else None
    return left.shape == right.shape and (torch.equal(*bits) if bits else torch.equal(left, right))


def error_is_as_stated(name: str, values: torch.Tensor, decoded: torch.Tensor) -> bool:
    """What the docstrings of the codecs say, with room for float32."""
    values, decoded = values.double(), decoded.double()
    off, classes, slack = (decoded - values).abs(), values.shape[-1] if values.dim() else 1, 1e-6
    if name == "uint8":
        return bool((off.sum(-1) <= values.amax(-1) * (classes - 1) / 255 + slack).all())
    if name.startswith("bits"):
        steps = 2 ** int(name.partition("=")[2] or 1) - 1
        on_grid = ((decoded * steps).round() - decoded * steps).abs() < 1e-4
        return bool((off < 1 / steps + slack).all() and on_grid.all())
    if name.startswith("top"):
        k = int(name.partition("=")[2] or 1)
        largest, places = (part[..., :k] for part in values.sort(dim=-1, descending=True, stable=True))
        kept, order = decoded.gather(-1, places), decoded.sort(-1).values
        near = (largest - kept).abs() < 2 / 255 + slack
        alike = order[..., : classes - k] == order[..., :1]
        return bool(near.all() and alike.all() and (kept.amin(-1) >= order[..., classes - k - 1]).all())
    most, relative, least = {
        "float32": (torch.finfo(torch.float32).max, 0, 0),
        "float16": (65504, 2**-11, 2**-25),
        "bfloat16": (torch.finfo(torch.bfloat16).max, 2**-8, 2**-134),
    }[name]
    clipped = values.clamp(-most, most)
    finite = values.isfinite()
    within = (decoded - clipped).abs() <= (relative * clipped.abs()).clamp_min(least)
    return bool(within[finite].all()) and torch.equal(decoded[~finite].nan_to_num(7), values[~finite].nan_to_num(7))


@pytest.mark.parametrize(("name", "coder"), EVERY)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.lists(st.integers(0, 9), max_size=2),
    classes=st.sampled_from([1, 2, 4, 5, 10, 16, 17, 100, 256, 300]),
)
def test_the_laws_of_every_codec(name, coder, seed, shape, classes):
    codec = make(name, coder)
    classes = max(classes, codec.k + 1) if isinstance(codec, codecs.Top) else classes
    values = draw(codec, seed, *shape, classes)
    wire = codec.encode(values, None)
    decoded = codec.decode(wire, None, values.numel())
    assert decoded.shape == values.shape
    assert decoded.dtype == torch.float32
    assert error_is_as_stated(name, values, decoded)
    if codec.labels:
        assert (decoded >= 0).all()
        assert torch.allclose(decoded.sum(-1), torch.ones(values.shape[:-1]), atol=1e-5)
        assert codec.bound(values, None) == codec.bound(decoded, None)
    assert same(codec.encode(decoded, None), wire)
    # Whatever both ends hold, the same comes out.
    delta = make(name, coder, delta=True)
    half = torch.where(torch.rand(*shape, 1, generator=torch.Generator().manual_seed(seed)) < 0.5, decoded, values)
    for reference in (
        None,
        values,
        decoded,
        half,
        decoded.flatten()[1:],
        decoded.double(),
        torch.full(values.shape, math.nan),
    ):
        sent = delta.encode(values, reference)
        assert sent.dtype == torch.uint8
        assert same(delta.decode(sent, reference, values.numel()), decoded)
        assert same(delta.encode(decoded, reference), sent)


@pytest.mark.parametrize(("name", "coder"), [(name, coder) for name, coder in EVERY if name in FLOATS])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 0), (0, 3), (2, 3, 4, 5)])
def test_floats_of_any_shape(name, coder, shape):
    for delta in (False, True):
        codec, values = make(name, coder, delta), numbers(1, *shape)
        for reference in (None, torch.zeros(shape)):
            decoded = codec.decode(codec.encode(values, reference), reference, values.numel())
            assert decoded.shape == shape
            assert error_is_as_stated(name, values, decoded)


def test_float32_is_exact_and_plain_unless_it_is_asked_to_be_coded():
    values = torch.tensor(EXTREMES)
    assert codecs.Float32().encode(values, None) is values
    assert codecs.Float32().decode(values, None, len(EXTREMES)) is values
    assert codecs.Float32().encode(torch.zeros(80_000, 10), None).nbytes == 3_200_000
    for codec in (make("float32", "zstd"), make("float32", delta=True)):
        assert same(codec.decode(codec.encode(values, None), None, len(EXTREMES)), values)


def test_half_precision_saturates_and_leaves_what_is_infinite():
    values = torch.tensor([1e5, -1e5, 3.4e38, -math.inf])
    for name, most in (("float16", 65504.0), ("bfloat16", torch.finfo(torch.bfloat16).max)):
        codec = make(name)
        decoded = codec.decode(codec.encode(values, None), None, 4).tolist()
        assert decoded[2:] == [most, -math.inf]
        assert decoded[0] == pytest.approx(min(1e5, most), rel=2**-8)


@pytest.mark.parametrize("name", FLOATS)
def test_every_nan_is_one(name):
    """A SIMD unit and what is left over at the end of a tensor make different ones."""
    codec, values = make(name, delta=True), torch.full((37,), math.nan)
    wire = codec.encode(values, None)
    decoded = codec.decode(wire, None, 37)
    assert decoded.isnan().all()
    assert same(codec.encode(decoded, None), wire)
    assert codec.encode(values, decoded).nbytes == len(bytes([1, 1, 37, 0]))


def grid(classes: int, steps: int) -> torch.Tensor:
    """Every point of the simplex whose entries are multiples of 1 / steps."""
    points = [p for p in itertools.product(range(steps + 1), repeat=classes) if sum(p) == steps]
    return torch.tensor(points, dtype=torch.float64) / steps


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_constrained_quantization_is_the_nearest_point(classes, bits):
    codec, values = codecs.Bits(bits=bits), probabilities(bits, 300, classes)
    decoded = codec.decode(codec.encode(values, None), None, values.numel())
    distances = (values.double()[:, None] - grid(classes, 2**bits - 1)).abs().sum(-1)
    assert torch.allclose((values.double() - decoded).abs().sum(-1), distances.amin(1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("bits", [0.2, 0.4, 0.4], [0, 1, 0]),
        ("bits:bits=2", [0.5, 0.5], [2 / 3, 1 / 3]),
        ("bits:bits=2", [0.25, 0.25, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3, 0]),
        ("uint8", [0.25, 0.5, 0.25, 0.0], [128 / 511, 255 / 511, 128 / 511, 0]),
        ("top", [0.1, 0.2, 0.2, 0.2, 0.3], [178 / 1020, 178 / 1020, 178 / 1020, 178 / 1020, 77 / 255]),
        ("top", [0.2, 0.2, 0.2, 0.2, 0.2], [0.2] * 5),
        ("top:k=3", [0.395104, 0.395104, 0.21079, 0.0], [101 / 255, 101 / 255, 53 / 255, 0]),  # sums to a bit more
        ("top:k=2", [0.0, 0.999, 0.0, 0.001], [0, 1, 0, 0]),
        ("top", [1 / 1000] * 1000, [1 / 255] + [254 / 255 / 999] * 999),  # one level up, lest it end below the others
    ],
)
def test_by_hand(name, row, expected):
    codec = make(name)
    assert codec.decode(codec.encode(torch.tensor([row]), None), None, len(row))[0].tolist() == pytest.approx(
        expected, abs=1e-7
    )


@pytest.mark.parametrize(
    ("codec", "values", "expected"),
    [
        (
            codecs.Bits(),
            torch.eye(10)[[3, 7, 1]],
            "00 02 03 0a 37 10",
        ),  # a delta or not, dimensions, shape; 4 bits each
        (codecs.Bits(bits=2), torch.tensor([[2 / 3, 0, 1 / 3]]), "00 02 01 03 84"),
        (codecs.UInt8(), torch.tensor([0.5, 0.25, 0.25]), "00 01 03 ff 80 80"),
        (codecs.Top(), torch.tensor([[0.2, 0.8]]), "00 02 01 02 80 cc"),
        (codecs.Float16(), torch.tensor([1.0, -2.0]), "00 01 02 00 00 3c c0"),
        (codecs.Bits(coder="range"), torch.eye(200)[[130, 130]], "00 02 02 c8 01 00 81 01 02"),  # 130 zeros, then two
        (
            codecs.Bits(coder="range"),
            torch.eye(4)[[0, 1, 0, 3, 0, 1, 0, 0] * 3],
            "00 02 18 04 0f 06 00 00 03 01 d7 fb 2f 7b",
        ),
    ],
)
def test_the_format_does_not_change(codec, values, expected):
    wire = codec.encode(values, None)
    assert bytes(wire.numpy()).hex(" ") == expected
    assert torch.allclose(codec.decode(wire, None, 10**4), values, atol=2e-3)


@pytest.mark.parametrize("name", LABELS + FLOATS)
def test_unchanged_rows_cost_only_the_bitmap(name):
    codec = make(name, delta=True)
    values = draw(codec, 1, 1000, 10)
    held = codec.decode(codec.encode(values, None), None, 10_000)
    head = len(bytes([1, 2, 0xE8, 0x07, 10]))
    assert codec.encode(values, held).nbytes == head + 1000 // 8
    changed = held.clone()
    changed[17] = draw(codec, 2, 10)
    one, none = codec.encode(held[:1], None).nbytes, codec.encode(held[:0], None).nbytes
    assert codec.encode(changed, held).nbytes == head + 1000 // 8 + one - none
    assert name in FLOATS or codec.bound(values, held) == 0


@pytest.mark.parametrize("name", LABELS)
def test_unchanged_rows_cost_next_to_nothing_after_a_range_coder(name):
    codec = make(name, "range", delta=True)
    held = codec.decode(codec.encode(probabilities(1, 1000, 10), None), None, 10_000)
    assert codec.encode(held, held).nbytes == len(bytes([1, 2, 0xE8, 0x07, 10])) + len(bytes([0xE8, 0x07]))


def shannon(shares: list[float]) -> float:
    return -math.fsum(p * math.log2(p) for p in shares if p)


def test_the_bound_by_hand():
    labels = torch.eye(4)[[0, 0, 1, 2]]
    assert codecs.Bits().bound(labels, None) == pytest.approx(4 * 1.5)
    held = torch.eye(4)[[0, 3, 3, 3]]  # three rows change, to three classes
    assert codecs.Bits(delta=True).bound(labels, held) == pytest.approx(4 * shannon([1 / 4, 3 / 4]) + 3 * math.log2(3))
    assert codecs.Bits().bound(labels, held) == pytest.approx(4 * 1.5)
    two = torch.tensor([[0.8, 0.2], [0.2, 0.8]])  # classes 0 and 1, both times level 204
    assert codecs.Top().bound(two, None) == pytest.approx(2)
    assert codecs.UInt8().bound(torch.eye(4)[:1], None) == pytest.approx(4 * shannon([1 / 4, 3 / 4]))
    assert codecs.Bits().bound(labels[:0], None) == 0
    assert codecs.Float16().bound(labels, None) is None


@pytest.mark.parametrize(
    "shares", [[0.1] * 10, [0.5, 0.2, 0.1, 0.1, 0.05, 0.02, 0.01, 0.01, 0.005, 0.005], [1.0] + [0.0] * 9]
)
def test_80_000_labels_come_within_five_percent_of_their_entropy(shares):
    classes = torch.multinomial(
        torch.tensor(shares), 80_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    codec = specs.call("codec", "bits:bits=1,coder=range")
    bound = codec.bound(torch.eye(10)[classes], None) / 8
    assert bound == pytest.approx(80_000 * shannon(shares) / 8, rel=0.01)
    assert bound <= codec.encode(torch.eye(10)[classes], None).nbytes <= 1.05 * bound + 10


def test_one_bit_bound_of_cfd():
    """80,000 log2(10) / 8 bytes (Sattler et al., 2020); SCARLET's port counts 16 bytes a label."""
    labels = torch.eye(10).repeat(8000, 1)
    assert codecs.Bits().bound(labels, None) / 8 == pytest.approx(33_219, abs=1)
    assert codecs.Bits(coder="range").encode(labels, None).nbytes == pytest.approx(33_219, rel=0.05)
    assert codecs.Bits().encode(labels, None).nbytes == pytest.approx(80_000 / 2, abs=10)


@pytest.mark.parametrize(
    "text", ["float32:coder=range", "bfloat16:coder=range", "bits:bits=0", "bits:bits=9", "top:k=0", "uint8:coder=lz4"]
)
def test_what_no_codec_is(text):
    with pytest.raises(UsageError):
        specs.call("codec", text)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    "row", [[math.nan, 1, 0, 0], [0.5, 0.5, 0.5, 0], [1.5, -0.5, 0, 0], [0, 0, 0, 0], [math.inf, 0, 0, 0], []]
)
def test_what_is_no_probability_is_refused(name, row):
    with pytest.raises(ValueError, match="soft labels"):
        make(name).encode(torch.tensor([row]), None)


def test_top_needs_more_classes_than_it_keeps():
    with pytest.raises(ValueError, match="with 3 classes, k is at most 2"):
        codecs.Top(k=3).encode(torch.eye(3), None)


def survives(codec: codecs.Codec, wire: bytes, reference: torch.Tensor | None, limit: int) -> torch.Tensor | None:
    """What comes out of any bytes: nothing, or a tensor of the kind."""
    try:
        decoded = codec.decode(torch.frombuffer(bytearray(wire), dtype=torch.uint8), reference, limit)
    except ValueError:
        return None
    assert decoded.dtype == torch.float32
    assert decoded.numel() <= limit
    if codec.labels and decoded.numel():
        assert torch.allclose(decoded.sum(-1), torch.ones(decoded.shape[:-1]), atol=1e-5)
    return decoded


@pytest.mark.parametrize(("name", "coder"), [pair for pair in EVERY if pair != ("float32", "none")])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.floats(0, 1, exclude_max=True), junk=st.binary(max_size=40), data=st.data())
def test_whatever_comes_is_a_tensor_or_a_value_error(name, coder, seed, cut, junk, data):
    codec = make(name, coder, delta=True)
    values = draw(codec, seed, 20, 5)
    reference = codec.decode(codec.encode(values.flip(0), None), None, 100)
    for held in (None, reference):
        wire = bytes(codec.encode(values, held).numpy())
        assert survives(codec, wire, held, 100) is not None
        assert survives(codec, wire, held, 99) is None
        assert survives(codec, wire[: int(cut * len(wire))], held, 100) is None
        assert survives(codec, wire + b"\0", held, 100) is None
        bit = data.draw(st.integers(0, 8 * len(wire) - 1))
        flipped = bytearray(wire)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(codec, bytes(flipped), held, 100)
        survives(codec, wire[:4] + junk, held, 100)
        survives(codec, junk, held, 100)
    # A delta to a tensor that is not available, or to something else.
    assert survives(codec, wire, None, 100) is None
    assert survives(codec, wire, reference[:-1], 100) is None
    assert survives(make(name, coder), wire, reference, 100) is None


@pytest.mark.parametrize(
    ("codec", "body", "expected"),
    [
        (codecs.Bits(), [0, 2, 2, 10, 0x3A], "alphabet"),
        (codecs.Bits(), [2, 2, 2, 10, 0x37], "header"),
        (codecs.Bits(), [0, 17, *[1] * 17, 0x37], "header"),
        (codecs.Bits(), [0, 2, *[255] * 9], "too long"),
        (codecs.Bits(), [0, 2, 0, 0], "classes"),
        (codecs.Bits(), [0, 3, *[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1] * 2, 0], "too long|numbers"),
        (codecs.Bits(bits=2), [0, 1, 3, 0xE4], "sum"),
        (codecs.UInt8(), [0, 1, 2, 254, 1], "255"),
        (codecs.Top(k=2), [0, 1, 4, 0x50, 1, 1], "ascend"),
        (codecs.Top(k=2), [0, 1, 4, 0x10, 200, 56], "255"),
        (codecs.Bits(coder="range"), [0, 2, 2, 4, 1, 2], "counts of symbols"),
        (codecs.Bits(coder="range"), [0, 2, 2, 4, 0, 9, 2], "counts of symbols"),
        (codecs.Bits(coder="range"), [0, 2, 2, 2, 1, 1, 1, 0, 0, 0, 0], "stated counts"),
        (codecs.Bits(coder="range"), [0, 2, 2, 2, 1, 1, 2, 0, 0, 0, 0], "truncated"),
        (codecs.Bits(coder="range"), [0, 2, 9, 4, 5, 3, 0, 0, 1, 2, *[255] * 8], "range code"),
        (codecs.Bits(coder="zstd"), [0, 2, 2, 4, 1, 2], "zstd"),
    ],
)
def test_a_malformed_encoding_is_an_error_with_the_reason(codec, body, expected):
    with pytest.raises(ValueError, match=expected):
        codec.decode(torch.tensor(body, dtype=torch.uint8), None, 1000)


def test_anything_but_a_uint8_vector_is_refused():
    for wire in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="one-dimensional uint8 tensor"):
            codecs.UInt8().decode(wire, None, 100)
    for wire in (torch.zeros(4, dtype=torch.uint8), torch.zeros(101)):
        with pytest.raises(ValueError, match="at most 100 floats"):
            codecs.Float32().decode(wire, None, 100)


def test_nothing_large_is_made_of_little():
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**26))
    rows = entropy.number(2**40)
    wires = [
        (make("uint8", "zstd"), bytes([0, 2, 10, 10]) + bomb),
        (make("uint8", "zstd"), bytes([0, 2, 10, 10]) + streamed),
        (make("bits", "range"), bytes([0, 2]) + rows + bytes([10]) + rows),  # all of one class
        (make("float16"), bytes([0, 2]) + rows + bytes([0])),  # many rows of nothing: no numbers, and no bytes
        (make("bits", "range"), bytes([0, 2, 1]) + rows + bytes([1])),
    ]
    assert max(len(wire) for _, wire in wires) < 10_000
    tracemalloc.start()
    try:
        outcomes = [survives(codec, wire, None, 100) for codec, wire in wires]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert [outcome is None for outcome in outcomes] == [True, True, True, False, True]


def test_every_codec_of_the_catalog_is_tested():
    assert set(CATALOG["codec"]) == {name.partition(":")[0] for name, _ in EVERY}
    assert {specs.call("codec", name).labels for name in FLOATS} == {False}
    assert {specs.call("codec", name).labels for name in LABELS} == {True}


def test_the_packed_bits_are_those_of_a_slow_packer():
    generator = np.random.default_rng(0)
    for alphabet in (1, 2, 3, 10, 200, 256, 1000, 65536):
        symbols = generator.integers(0, alphabet, 37).astype(np.uint16)
        width = math.ceil(math.log2(alphabet))
        text = "".join(f"{symbol:0{width}b}" for symbol in symbols.tolist()) if width else ""
        text += "0" * (-len(text) % 8)
        expected = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
        assert entropy.write("none", [(symbols, alphabet)]) == expected
