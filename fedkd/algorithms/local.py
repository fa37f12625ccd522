"""Lower and upper bound: every client on its own, and all data in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.algorithms.base import DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.core.tensors import put

if TYPE_CHECKING:
    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class Local(Algorithm):
    """No communication: each client trains its own model on its own samples."""

    ignores: ClassVar[frozenset[str]] = DISTILLATION | STUDENT

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        return Update({}, len(client.data)), put("model", setup.trainer.train(client, setup.local_weights(client)))


@dataclass(frozen=True)
class Central(Local):
    """`Local` for one client that holds the samples of all clients that would take part in the round."""

    pools_data: ClassVar[bool] = True
