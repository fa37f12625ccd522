"""Parsing the names of teachers, without heavy imports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedkd import models
from fedkd.core import specs
from fedkd.core.errors import UsageError

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig


def named(config: DistillConfig) -> list[str]:
    """The specs in ``--teacher``, separated by commas or spaces."""
    return [spec for text in config.teacher.split() for spec in models.split(text)]


def is_path(text: str) -> bool:
    """Whether the text is the path of a run or of a student's file, not a model."""
    return "=" not in text and ".py:" not in text and ("/" in text or text.endswith(".safetensors"))


def pretrained(text: str) -> tuple[str, Path | None]:
    """A model's spec without the option ``pretrained=PATH``, and the path."""
    spec = specs.parse(text)
    if "pretrained" not in spec.options:
        return text, None
    value = spec.options["pretrained"]
    if not value:
        raise UsageError(f"{text}: pretrained= has no file.")
    head, _, rest = text.partition(":")
    options = [item for item in rest.split(",") if not item.replace("-", "_").strip().startswith("pretrained=")]
    return head + (f":{','.join(options)}" if options else ""), Path(value).expanduser()


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
