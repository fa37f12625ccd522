"""The cache directory: decoded data sets, partitions and trained teachers. A damaged file is made again."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core import notes, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors

CHECKSUM = "crc32"  # its key in the metadata of a file: the fastest checksum of the standard library


def directory() -> Path:
    """The cache directory: ``FEDKD_CACHE``, else the user's cache directory."""
    if chosen := os.environ.get("FEDKD_CACHE"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fedkd")


def get(name: str, make: Callable[[], Tensors]) -> dict[str, Tensor]:
    """The tensors that are kept under ``name`` (KIND/HASH), mapped from their file, so that processes share them.

    If there are none, or they are damaged, ``make`` makes them. What cannot be kept only takes time at the next start.
    """
    path = directory() / f"{name}.safetensors"
    if (kept := _read(path, name)) is not None:
        return kept
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors.save(made, path, {CHECKSUM: _checksum(name, made)})
    except OSError as error:
        notes.say(
            f"the cache {directory()} cannot be written ({error.strerror}); the run does without it. "
            "Set FEDKD_CACHE to another folder."
        )
        return dict(made)
    return _read(path, name) or dict(made)


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors in a file; None if there is no such file, or another one."""
    if not os.path.exists(path):  # of a path object it raises for some folders that cannot be read
        return None
    try:
        kept, about = tensors.read(path)
        if about[CHECKSUM] == _checksum(name, kept):
            return kept
    except Exception:  # whatever a damaged file causes
        pass
    notes.say(f"{path} is damaged; it is made again.")
    return None


def _checksum(name: str, kept: Tensors) -> str:
    """Of the name too, so that a file under the name of another one does not pass."""
    value = zlib.crc32(name.encode())
    for part in tensors.parts(kept):
        value = zlib.crc32(part, value)
    return f"{value:08x}"
