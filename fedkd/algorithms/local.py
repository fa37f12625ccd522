"""The two ends of the scale: every client alone, and all data in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.tensors import put

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Local(Algorithm):
    """No exchange: each client trains its own model on its own rows."""

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        return Update({}, len(client.data)), put("model", kit.fit(client, kit.own(client)))


@dataclass(frozen=True)
class Central(Local):
    """`Local` for one client that holds the rows of all who would take part in a round: the ceiling, no federation."""

    pooled: ClassVar[bool] = True
