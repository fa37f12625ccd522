"""How teachers are named; nothing heavy is imported to read a name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedkd import models
from fedkd.core import specs
from fedkd.core.errors import UsageError

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig


def named(config: DistillConfig) -> list[str]:
    """The specs of ``--teacher``, commas and spaces alike."""
    return [spec for text in config.teacher.split() for spec in models.split(text)]


def is_path(text: str) -> bool:
    """Whether it names a run or a student's file, not a model."""
    return "=" not in text and ".py:" not in text and ("/" in text or text.endswith(".safetensors"))


def pretrained(text: str) -> tuple[str, Path | None]:
    """A model's spec without its option ``pretrained=PATH``, and the path."""
    spec = specs.parse(text)
    if "pretrained" not in spec.options:
        return text, None
    value = spec.options["pretrained"]
    if not value:
        raise UsageError(f"{text}: pretrained names no file.")
    head, _, rest = text.partition(":")
    kept = [item for item in rest.split(",") if not item.replace("-", "_").strip().startswith("pretrained=")]
    return head + (f":{','.join(kept)}" if kept else ""), Path(value).expanduser()


def candidates(directory: Path) -> list[str]:
    """Every student in a directory, or in the runs in it.

    Raises:
        UsageError: there is none.

    """
    found = sorted(str(path) for pattern in ("*.safetensors", "*/*.safetensors") for path in directory.glob(pattern))
    if not found:
        raise UsageError(f"--teachers-from {directory} holds no student (.safetensors), nor a run that left one.")
    return found
