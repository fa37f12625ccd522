"""PyTorch, imported at its first use, so that a user's mistake is reported before (decision 2)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _LazyModule:
    """A module that is imported when an attribute of it is first read."""

    def __init__(self, name: str) -> None:
        self.__dict__["__name__"] = name

    def __getattr__(self, attribute: str) -> Any:
        value = self.__dict__[attribute] = getattr(import_module(self.__dict__["__name__"]), attribute)
        return value


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")
