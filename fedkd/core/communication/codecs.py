"""Codecs: how soft labels and weights are encoded for transmission.

A codec turns the rows of a tensor (its last dimension) into streams of small integers, and a coder turns the streams
into bytes (`entropy`). Quantization is idempotent: decoded values encode to the same bytes. Levels are integers, so
that both ends agree bitwise. An encoding that cannot be decoded raises a ValueError of one clause.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from fedkd.core.communication import entropy
from fedkd.core.communication.entropy import Coder, Stream, Symbols
from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = 2**16  # the largest number of classes, so that float32 separates neighboring levels of `Top`
DIMENSIONS = 16  # the largest number of dimensions of a tensor

Plan = list[tuple[int, int]]  # of each stream: the symbols per row, and the size of their alphabet


@dataclass(frozen=True)
class Codec:
    """An encoding of tensors. ``coder`` encodes the symbols; ``delta`` leaves out rows that both ends have.

    The bytes are: whether it is a delta, the shape, and the streams; a delta starts with a bitmap of changed rows.
    """

    labels: ClassVar[bool] = True  # whether it applies only to soft labels: probabilities whose rows sum to one

    coder: Coder = "none"
    delta: bool = False

    def encode(self, values: Tensor, reference: Tensor | None) -> Tensor:
        """The bytes, as a uint8 tensor. ``reference`` is the last tensor that both ends decoded, if there is one.

        Raises:
            ValueError: the codec does not apply to the values.

        """
        is_delta, streams = self._streams(values, reference)
        head = b"".join(entropy.number(n) for n in (is_delta, values.dim(), *values.shape))
        return torch.frombuffer(bytearray(head + entropy.write(self.coder, streams)), dtype=torch.uint8)

    def decode(self, encoding: Tensor, reference: Tensor | None, limit: int) -> Tensor:
        """The values, float32 and in their shape.

        Raises:
            ValueError: they cannot be decoded, or are more than ``limit`` numbers.

        """
        if encoding.dtype != torch.uint8 or encoding.dim() != 1:
            raise ValueError("an encoded tensor is a one-dimensional uint8 tensor")
        body = BytesIO(encoding.numpy().tobytes())
        is_delta, shape = _head(body, limit)
        count, width = _extent(shape)
        plan = self._plan(width)
        common = self._common(reference, shape) if is_delta else None
        if is_delta and common is None:
            raise ValueError("it is a delta to a tensor that is not available")
        body = entropy.opened(self.coder, body, [(count, 2), *((count * each, of) for each, of in plan)])
        changed = entropy.read(self.coder, body, count, 2).astype(bool) if is_delta else np.ones(count, bool)
        sent = int(changed.sum())
        streams = [entropy.read(self.coder, body, sent * each, of).reshape(sent, each) for each, of in plan]
        rows = self._rows(streams, width)
        if body.read(1):
            raise ValueError("bytes are left over")
        if common is not None:
            rows = common.index_put((torch.from_numpy(changed),), rows)
        return rows.reshape(shape)

    def bound(self, values: Tensor, reference: Tensor | None) -> float | None:
        """The entropy bound in bits: the least that a coder of single symbols can reach.

        The number of symbols times their entropy, of each stream and of the bitmap of a delta. None for floats, whose
        bytes are not symbols of a small alphabet.
        """
        if not self.labels:
            return None
        return sum(entropy.entropy(symbols) for symbols, _ in self._streams(values, reference)[1])

    def _streams(self, values: Tensor, reference: Tensor | None) -> tuple[bool, list[Stream]]:
        """Whether it is a delta, and each stream with its alphabet."""
        count, width = _extent(values.shape)
        plan = self._plan(width)
        symbols = self._symbols(values.float().reshape(count, width))
        common = self._common(reference, values.shape)
        if common is None:
            return False, [(stream, of) for stream, (_, of) in zip(symbols, plan, strict=True)]
        differ = self._rows(symbols, width).view(torch.int32) != common.view(torch.int32)
        changed = differ.any(1).numpy()
        return True, [(changed, 2), *((stream[changed], of) for stream, (_, of) in zip(symbols, plan, strict=True))]

    def _common(self, reference: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """The rows that both ends have, if the reference fits."""
        if not self.delta or reference is None or reference.shape != shape or reference.dtype != torch.float32:
            return None
        return reference.reshape(_extent(shape))

    def _plan(self, width: int) -> Plan:
        """The streams of rows of ``width`` numbers."""
        raise NotImplementedError

    def _symbols(self, rows: Tensor) -> list[Symbols]:
        """The streams of rows [N, width]."""
        raise NotImplementedError

    def _rows(self, streams: list[Symbols], width: int) -> Tensor:
        """The rows of streams, float32 [N, width]; ValueError for symbols that are not an encoding."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Floats(Codec):
    """Floats of one dtype, with one stream for each of their bytes: bytes of exponents are similar and compress."""

    labels: ClassVar[bool] = False
    kind: ClassVar[str]  # the name of the dtype in torch

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        dtype: torch.dtype = getattr(torch, self.kind)
        return dtype

    def __post_init__(self) -> None:
        if self.coder == "range":
            raise ValueError("coder=range applies to soft labels (uint8, bits, top); floats take none or zstd")

    def _plan(self, width: int) -> Plan:
        return [(width, 256)] * self.dtype.itemsize

    def _symbols(self, rows: Tensor) -> list[Symbols]:
        most = torch.finfo(self.dtype).max
        floats = _cast(torch.where(rows.isfinite(), rows.clamp(-most, most), rows), self.dtype)
        words = floats.view(torch.int32 if self.dtype.itemsize == 4 else torch.int16).numpy()
        octets = words.astype(f"<i{self.dtype.itemsize}")[..., None].view(np.uint8)
        return list(np.moveaxis(octets, -1, 0))

    def _rows(self, streams: list[Symbols], width: int) -> Tensor:
        words = np.stack(streams, axis=-1).view(f"<i{self.dtype.itemsize}")[..., 0]
        return _cast(torch.from_numpy(words.astype(f"i{self.dtype.itemsize}")).view(self.dtype), torch.float32)


@dataclass(frozen=True)
class Float32(_Floats):
    """Exact. Without coder and delta a tensor is sent unchanged."""

    kind: ClassVar[str] = "float32"

    def encode(self, values: Tensor, reference: Tensor | None) -> Tensor:
        return values if self == Float32() else super().encode(values, reference)

    def decode(self, encoding: Tensor, reference: Tensor | None, limit: int) -> Tensor:
        if self != Float32():
            return super().decode(encoding, reference, limit)
        if not encoding.is_floating_point() or encoding.numel() > limit:
            raise ValueError(f"it is not a tensor of at most {limit} floats")
        return encoding.float()


@dataclass(frozen=True)
class Float16(_Floats):
    """Error at most 2^-11 |x|, or 2^-25 near zero; values beyond 65,504 become the nearest finite number."""

    kind: ClassVar[str] = "float16"


@dataclass(frozen=True)
class BFloat16(_Floats):
    """Error at most 2^-8 |x|, with the range of float32."""

    kind: ClassVar[str] = "bfloat16"


@dataclass(frozen=True)
class UInt8(Codec):
    """Each probability in 255ths of the largest of its row; a decoded row is normalized to sum to one.

    The L1 error of a row of C is at most max(p) (C - 1) / 255.
    """

    def _plan(self, width: int) -> Plan:
        return [(_classes(width), 256)]

    def _symbols(self, rows: Tensor) -> list[Symbols]:
        probs = _probabilities(rows)
        return [np.rint(probs / probs.max(1, keepdims=True) * 255).astype(np.uint8)]

    def _rows(self, streams: list[Symbols], width: int) -> Tensor:
        levels = streams[0]
        if (levels.max(1) != 255).any():
            raise ValueError("the largest level of a row is not 255")
        return _float32(levels / levels.sum(1, keepdims=True))


@dataclass(frozen=True)
class Bits(Codec):
    """Constrained quantization (CFD: Sattler et al., 2020), to ``bits`` per probability.

    The point nearest to a row in L1 whose entries are multiples of 1 / (2^bits - 1) and sum to one. Each error is less
    than one step. With one bit only the largest class is left, which is sent as one number.
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 1

    def _plan(self, width: int) -> Plan:
        return [(1, _classes(width))] if self.bits == 1 else [(_classes(width), 2**self.bits)]

    def _symbols(self, rows: Tensor) -> list[Symbols]:
        probs, steps = _probabilities(rows), 2**self.bits - 1
        if self.bits == 1:
            return [probs.argmax(1)[:, None].astype(np.uint16)]
        return [_nearest(probs * steps, steps).astype(np.uint8)]

    def _rows(self, streams: list[Symbols], width: int) -> Tensor:
        levels, steps = streams[0], 2**self.bits - 1
        if self.bits == 1:
            return _float32(levels == np.arange(width))
        if (levels.sum(1) != steps).any():
            raise ValueError(f"the levels of a row do not sum to {steps}")
        return _float32(levels / steps)


@dataclass(frozen=True)
class Top(Codec):
    """The ``k`` largest probabilities, in 255ths, with their classes; the rest is spread evenly over the other classes.

    The error of each of the k is less than 2/255, and none becomes smaller than the others.
    """

    k: PositiveInt = 1

    def _plan(self, width: int) -> Plan:
        if self.k >= _classes(width):
            raise ValueError(f"with {width} classes, k is at most {width - 1}")
        return [(self.k, width), (self.k, 256)]

    def _symbols(self, rows: Tensor) -> list[Symbols]:
        probs, others = _probabilities(rows), rows.shape[1] - self.k
        classes = _largest(probs, self.k)
        kept = 255 * np.take_along_axis(probs, classes, 1)
        rest = np.maximum(255 - kept.sum(1, keepdims=True), 0)
        levels = _nearest(np.hstack([kept, rest]), 255)
        while (low := levels[:, :-1] * others < levels[:, -1:]).any():
            row = np.flatnonzero(low.any(1))
            levels[row, low[row].argmax(1)] += 1
            levels[row, -1] -= 1
        shares = _shares(classes, levels[:, :-1], rows.shape[1])
        classes = np.sort(_largest(shares, self.k), 1)  # if some of the k are as small as the others, the first classes
        levels = np.take_along_axis(shares, classes, 1) // others
        return [classes.astype(np.uint16), levels.astype(np.uint8)]

    def _rows(self, streams: list[Symbols], width: int) -> Tensor:
        classes, levels = (stream.astype(np.int64) for stream in streams)
        if (np.diff(classes) <= 0).any() or (levels.sum(1) > 255).any():
            raise ValueError("classes do not ascend, or their levels sum to more than 255")
        return _float32(_shares(classes, levels, width) / (255 * (width - self.k)))


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype, with one bit pattern for all NaNs: torch's depends on the memory layout."""
    cast = values.to(dtype)
    return cast if dtype == values.dtype else cast.masked_fill(cast.isnan(), torch.nan)


def _nearest(cells: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Rows of integers that sum to ``total``, nearest to ``cells`` in L1: by largest remainder, then by index."""
    low: NDArray[np.float64] = np.floor(cells)
    order = np.argsort(low - cells, axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    low += rank < total - low.sum(1, keepdims=True)
    return low.astype(np.int64)


def _largest(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """The indices of the k largest in each row; of equal values, the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def _shares(classes: NDArray[np.int64], levels: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Rows in units of 1 / (255 (width - k)), in which the rest divides without remainder."""
    shares = np.repeat(255 - levels.sum(1, keepdims=True), width, 1)
    np.put_along_axis(shares, classes, levels * (width - classes.shape[1]), 1)
    return shares


def _probabilities(rows: Tensor) -> NDArray[np.float64]:
    """The rows in float64, if each sums to one; later operations are then exact or correctly rounded."""
    probs = rows.numpy().astype(np.float64)
    if not ((probs >= 0).all() and (abs(probs.sum(1) - 1) < 1e-3).all()):
        raise ValueError("soft labels must be probabilities, and each row must sum to one")
    return probs


def _classes(width: int) -> int:
    if not 1 <= width <= CLASSES:
        raise ValueError(f"soft labels have 1 to {CLASSES} classes, not {width}")
    return width


def _float32(rows: NDArray[Any]) -> Tensor:
    return torch.from_numpy(rows.astype(np.float32))


def _extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of rows and their width. A scalar is one row; an empty tensor has no rows."""
    width = shape[-1] if shape else 1
    return prod(shape) // max(width, 1), width


def _head(body: BytesIO, limit: int) -> tuple[bool, tuple[int, ...]]:
    """Whether it is a delta, and the shape."""
    kind, dimensions = entropy.read_number(body), entropy.read_number(body)
    if kind > 1 or dimensions > DIMENSIONS:
        raise ValueError("the header is not that of an encoded tensor")
    shape = tuple(entropy.read_number(body) for _ in range(dimensions))
    if prod(shape) > limit or prod(max(extent, 1) for extent in shape) >= 2**62:
        raise ValueError(f"it holds more than {limit} numbers")
    return kind == 1, shape
