"""Checkpoints: a directory with ``state-NUMBER.safetensors``, and ``checkpoint.json``, which names it.

The JSON file is replaced last, so that it always names a complete checkpoint; only then is the previous state deleted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core import run_directory, tensors
from fedkd.core.errors import DataError, ResumeError

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.options import Options
    from fedkd.core.tensors import Tensors

FORMAT = 2  # increase it when older checkpoints cannot be read
START_AGAIN = "Start the run again."


def write(folder: Path, number: int, state: Tensors, config: Options, more: Mapping[str, object]) -> None:
    """Write the checkpoint ``number``, then delete the previous one. ``more`` goes into the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"state-{number}.safetensors"
    # Cloned, since different tensors may be views of one memory. With the number, since the format has no empty files.
    tensors.save({"number": tensors.integer(number), **{name: t.clone() for name, t in state.items()}}, file)
    run_directory.sync(file)
    about = {"format": FORMAT, "number": number, "options": config.fixed(), **more}
    run_directory.write_json(folder / "checkpoint.json", {**about, "sha256": _digest(about, tensors.load(file))})
    run_directory.sync(folder)
    for old in folder.glob("state-*"):  # and what was left by a process that was killed
        if old != file:
            old.unlink()


def read(folder: Path, config: Options) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The JSON file and the state of a checkpoint, if there is one.

    Raises:
        DataError: it is damaged, or was written by another version.
        ResumeError: it was written with other options.

    """
    try:
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise DataError(f"{folder} was written by another version of fedkd; resume it with that version.")
        state = tensors.load(folder / f"state-{about['number']}.safetensors")
        if about.pop("sha256") != _digest(about, state):
            raise DataError(f"{folder} is damaged: its checksum is wrong. {START_AGAIN}")
    except FileNotFoundError:
        if (folder / "checkpoint.json").exists():
            raise DataError(f"{folder} is damaged: a file is missing. {START_AGAIN}") from None
        return None
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file causes
        raise DataError(f"{folder} is damaged ({type(error).__name__}). {START_AGAIN}") from error
    fixed = config.fixed()
    for key, value in about["options"].items():  # an option that is newer than the checkpoint has its default
        if fixed.get(key) != value:
            raise ResumeError(f"{folder} was written with --{key} {value}, not {fixed.get(key)}.")
    return about, state


def _digest(about: Mapping[str, object], state: Tensors) -> str:
    """The SHA-256 of both files."""
    text = json.dumps(about, sort_keys=True) + tensors.digest(state)
    return hashlib.sha256(text.encode()).hexdigest()


def with_checksum(content: bytes) -> bytes:
    """The content of a file behind its CRC-32."""
    return zlib.crc32(content).to_bytes(4, "big") + content


def without_checksum(content: bytes, whose: str) -> bytes:
    """What `with_checksum` was given.

    Raises:
        DataError: it has changed.

    """
    checksum, rest = content[:4], content[4:]
    if zlib.crc32(rest).to_bytes(4, "big") != checksum:
        raise DataError(f"{whose} is damaged: its checksum is wrong. {START_AGAIN}")
    return rest
