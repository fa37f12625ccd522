"""Tensors: named tensors, flat, on the CPU, without grad. Everything that outlives a call is one."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Shapes = Mapping[str, tuple[int, ...]]


class Int64(tuple[int, ...]):
    """The shape of a tensor of int64; a plain tuple is that of float32 numbers."""


class UInt8(tuple[int, ...]):
    """The shape of a tensor of bytes."""


def shapes(tensors: Tensors) -> Shapes:
    """Those of tensors that are float32, or int64 as BatchNorm's step counter is."""
    return {n: tuple(t.shape) if t.is_floating_point() else Int64(t.shape) for n, t in tensors.items()}


def put(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors under ``prefix/name``: how one mapping holds several."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def take(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors that were `put` under ``prefix``, by their own names."""
    start = len(prefix) + 1
    return {k[start:]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def numel(tensors: Tensors) -> int:
    """How many numbers there are."""
    return sum(tensor.numel() for tensor in tensors.values())


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether names, shapes, types and every bit of the values agree."""
    return digest(left) == digest(right)


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        sha.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def weighted_mean(many: Sequence[Tensors], weights: Iterable[float]) -> dict[str, Tensor]:
    """The weighted mean of mappings with the same names, each tensor in its own type.

    Sums run in float64 and in the order given, so that the result has the same bits whatever
    finished first. Integer tensors (BatchNorm's step counter) are averaged and truncated.
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
    """Write a safetensors file, whole or not at all, whoever else writes it; ``about`` is kept with it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, dict(about or {}))
        part.replace(path)
    except SafetensorError as error:  # a disk that is full or may not be written to
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; the values stay mapped to the file until they are used."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def integer(value: int) -> Tensor:
    """An int64 scalar: how a round number is kept and sent."""
    import torch

    return torch.tensor(value, dtype=torch.int64)
