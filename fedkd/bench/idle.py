"""A method without computation, to measure the engine alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.algorithms.base import Algorithm, Client, Update

if TYPE_CHECKING:
    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class Idle(Algorithm):
    """Clients reply at once, with the time in seconds at which the message arrived."""

    metrics: ClassVar[tuple[str, ...]] = ("time",)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        return Update({}, len(client.data), {"time": time.time()}), {}
