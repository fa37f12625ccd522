"""Parsing the names of teachers, without heavy imports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core import quotes
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import UsageError
from fedkd.training import models

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig


def named(config: DistillConfig) -> list[str]:
    """The specs in ``--teacher``, separated by commas or spaces outside of quotes; a single path needs no quotes."""
    if is_path(config.teacher) and _exists(config.teacher):
        return [config.teacher]
    return [quotes.unquoted(spec) for text in quotes.split(config.teacher) for spec in models.split(text)]


def is_path(text: str) -> bool:
    """Whether the text is the path of a run or of a student's file, not a model. A model's name is never a path."""
    if text.partition(":")[0] not in CATALOG["model"] and _exists(text):
        return True
    return "=" not in text and ".py:" not in text.replace('"', "") and ("/" in text or text.endswith(".safetensors"))


def _exists(text: str) -> bool:
    """Whether there is such a directory or student's file."""
    path = os.path.expanduser(text)
    return os.path.isdir(path) or (path.endswith(".safetensors") and os.path.isfile(path))


def candidates(directory: Path, out: str) -> list[str]:
    """The files of all students in a directory and in its subdirectories, but for those of this run itself.

    Raises:
        UsageError: there are none.

    """
    paths = (path for pattern in ("*.safetensors", "*/*.safetensors") for path in directory.glob(pattern))
    files = sorted(str(path) for path in paths if not out or path.parent.resolve() != Path(out).resolve())
    if not files:
        raise UsageError(f"--teachers-from {directory} contains no student (.safetensors) and no run with one.")
    return files
