"""Objects in a line: what a notebook prints of them."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def brief(self: Any) -> str:
    """The repr of a dataclass: arrays by their type and shape, options where they differ from their defaults."""
    fields = [field for field in dataclasses.fields(self) if not field.name.startswith("_")]
    items = (f"{field.name}={_shown(getattr(self, field.name))}" for field in fields if not _is_default(self, field))
    return f"{type(self).__name__}({', '.join(items)})"


def _is_default(self: Any, field: dataclasses.Field[Any]) -> bool:
    value, default = getattr(self, field.name), field.default
    default = getattr(default, "default", default)  # of a pydantic field
    return isinstance(value, str | int | float) and bool(value == default)


def _shown(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        listed = [f"{key}: {_shown(item)}" for key, item in list(value.items())[:4]]
        return f"{{{', '.join(listed)}{', ...' * (len(value) > 4)}}}"
    return repr(value) if getattr(type(value), "__repr__", None) is brief else _REPR.repr(value)
