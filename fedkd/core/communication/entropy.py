"""Entropy coding: streams of small integers as bytes, and back.

Coder ``none`` packs each symbol with as many bits as its alphabet needs, ``zstd`` compresses these bytes, and ``range``
comes within a few bytes of the entropy. Bytes that cannot be decoded raise a ValueError of one clause.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Literal

import constriction
import numpy as np
import zstandard
from numpy.typing import NDArray

LEVEL = 3  # compression level of zstd

Coder = Literal["none", "zstd", "range"]
Symbols = NDArray[Any]  # of an unsigned dtype, or bool
Stream = tuple[Symbols, int]  # symbols, and the size of their alphabet


def write(coder: Coder, streams: list[Stream]) -> bytes:
    """The streams as bytes."""
    pack = _ranged if coder == "range" else _packed
    body = b"".join(pack(symbols, alphabet) for symbols, alphabet in streams)
    return zstandard.ZstdCompressor(level=LEVEL).compress(body) if coder == "zstd" else body


def opened(coder: Coder, body: BytesIO, sizes: list[tuple[int, int]]) -> BytesIO:
    """The body that `read` reads, decompressed; ``sizes`` are the largest (symbols, alphabet) of each stream."""
    return _inflated(body.read(), sum(_bytes(*size) for size in sizes)) if coder == "zstd" else body


def read(coder: Coder, body: BytesIO, count: int, alphabet: int) -> Symbols:
    """The next stream, of ``count`` symbols."""
    return _unranged(body, count, alphabet) if coder == "range" else _unpacked(body, count, alphabet)


def number(value: int) -> bytes:
    """A nonnegative number with seven bits per byte, low bits first (LEB128)."""
    low = bytearray()
    while value > 127:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])


def read_number(body: BytesIO) -> int:
    """The next `number`, of at most 56 bits."""
    value = 0
    for place in range(8):
        byte = _take(body, 1)[0]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value
    raise ValueError("a number in it is too long")


def entropy(symbols: Symbols) -> float:
    """The entropy bound of the symbols in bits, coded one by one: -sum_s n_s log2(n_s / n)."""
    counts = np.bincount(symbols.ravel())
    used = counts[counts > 0]
    return float((used * np.log2(symbols.size / used)).sum())


def _take(body: BytesIO, count: int) -> bytes:
    taken = body.read(count)
    if len(taken) < count:
        raise ValueError("it is truncated")
    return taken


def _bytes(count: int, alphabet: int) -> int:
    """The number of bytes that `_packed` returns."""
    return -(-count * (alphabet - 1).bit_length() // 8)


def _packed(symbols: Symbols, alphabet: int) -> bytes:
    """Symbols with as many bits each as the largest of the alphabet needs, high bits first."""
    width = (alphabet - 1).bit_length()
    if width == 8:
        return symbols.astype(np.uint8).tobytes()
    bits = symbols.reshape(-1, 1) >> np.arange(width, dtype=np.uint16)[::-1] & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _unpacked(body: BytesIO, count: int, alphabet: int) -> Symbols:
    """``count`` symbols that were `_packed`."""
    width = (alphabet - 1).bit_length()
    symbols: Symbols = np.frombuffer(_take(body, _bytes(count, alphabet)), np.uint8)
    if width != 8:
        bits = np.unpackbits(symbols, count=count * width).reshape(count, width)
        symbols = bits @ (1 << np.arange(width, dtype=np.uint16)[::-1])
    if (symbols >= alphabet).any():
        raise ValueError("a symbol is not of the alphabet")
    return symbols


def _inflated(frame: bytes, most: int) -> BytesIO:
    """A zstd frame decompressed to at most ``most`` bytes. A frame that states a larger size is refused."""
    try:
        if zstandard.frame_content_size(frame) > most:
            raise ValueError("its zstd frame is too large")
        return BytesIO(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise ValueError("it is not a complete zstd frame") from error


def _ranged(symbols: Symbols, alphabet: int) -> bytes:
    """The counts of all symbols, and the words of a range coder with these frequencies; no words if all are equal."""
    counts = np.bincount(symbols.ravel(), minlength=alphabet)
    table, after = b"", 0
    for symbol in np.flatnonzero(counts).tolist():
        if symbol > after:
            table += number(0) + number(symbol - after - 1)  # a zero, and the number of further zeros
        table += number(int(counts[symbol]))
        after = symbol + 1
    if counts.max() == symbols.size:
        return table
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(symbols.ravel().astype(np.int32), _model(counts))
    words: NDArray[np.uint32] = encoder.get_compressed().astype("<u4")
    return table + number(len(words)) + words.tobytes()


def _unranged(body: BytesIO, count: int, alphabet: int) -> Symbols:
    """``count`` symbols that were `_ranged`."""
    counts = np.zeros(alphabet, np.int64)
    symbol, left = 0, count
    while left:
        often = read_number(body)
        if often > left or symbol >= alphabet:
            raise ValueError("its counts of symbols are damaged")
        counts[symbol] = often
        symbol += 1 if often else 1 + read_number(body)
        left -= often
    if counts.max() == count:
        return np.full(count, counts.argmax(), np.uint16)
    words = np.frombuffer(_take(body, 4 * read_number(body)), "<u4").astype(np.uint32)
    try:
        symbols: Symbols = constriction.stream.queue.RangeDecoder(words).decode(_model(counts), count)
    except AssertionError as error:
        raise ValueError("its range code does not fit its counts") from error
    if (np.bincount(symbols, minlength=alphabet) != counts).any():
        raise ValueError("its symbols do not have the stated counts")
    return symbols.astype(np.uint16)


def _model(counts: NDArray[np.int64]) -> Any:
    """The range coder's model for these counts, in 24-bit fixed point."""
    return constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False)
