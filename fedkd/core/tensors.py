"""Tensors: a flat mapping of names to CPU tensors without gradients, for states, messages and memories."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Shapes = Mapping[str, tuple[int, ...]]


class Int64(tuple[int, ...]):
    """The shape of an int64 tensor; a plain tuple is the shape of a float32 tensor."""


class UInt8(tuple[int, ...]):
    """The shape of a uint8 tensor."""


def itemsize(shape: tuple[int, ...]) -> int:
    """The bytes of a number in a tensor whose shape is declared."""
    return 8 if isinstance(shape, Int64) else 1 if isinstance(shape, UInt8) else 4


def shapes(tensors: Tensors) -> Shapes:
    """The shapes of float32 tensors, and of int64 tensors such as BatchNorm's step counter."""
    return {n: tuple(t.shape) if t.is_floating_point() else Int64(t.shape) for n, t in tensors.items()}


def put(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors under ``prefix/name``, so that one mapping can hold several."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def take(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that were `put` under ``prefix``, by their own names."""
    start = len(prefix) + 1
    return {k[start:]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def numel(tensors: Tensors) -> int:
    """The total number of elements."""
    return sum(tensor.numel() for tensor in tensors.values())


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether names, shapes, types and every bit of the values agree."""
    return digest(left) == digest(right)


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for part in parts(tensors):
        sha.update(part)
    return sha.hexdigest()


def parts(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """Names, types, shapes and bytes, in the order of the names, for a checksum. The bytes are not copied."""
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        yield f"{name}|{array.dtype}|{array.shape}|".encode()
        yield array.reshape(-1).view("uint8").data


def weighted_mean(many: Sequence[Tensors], weights: Iterable[float]) -> dict[str, Tensor]:
    """The weighted mean of mappings with the same names, each tensor in its own type.

    Sums run in float64 and in the order given, so that the result does not
    depend on which client finished first. Integer tensors (BatchNorm's step counter) are averaged and truncated.
    """
    shares = [float(weight) for weight in weights]
    total = sum(shares)
    mean: dict[str, Tensor] = {}
    for name, first in many[0].items():
        accumulated = first.double() * (shares[0] / total)
        for tensors, share in zip(many[1:], shares[1:], strict=True):
            accumulated += tensors[name].double() * (share / total)
        mean[name] = accumulated.to(first.dtype)
    return mean


def save(tensors: Tensors, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; ``about`` becomes its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()  # with the permissions of any new file here; safetensors replaces it by a file for its owner only
        mode = part.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, dict(about or {}))
        part.chmod(mode)
        part.replace(path)
    except SafetensorError as error:  # a full or read-only disk
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; values are memory-mapped until they are used."""
    return read(path)[0]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `load`, with the metadata of the file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def integer(value: int) -> Tensor:
    """An int64 scalar tensor, such as a round number."""
    import torch

    return torch.tensor(value, dtype=torch.int64)
