"""FedTGP (Zhang et al., 2024): FedProto whose prototypes are trained on the server, with a margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.fedproto import FedProto, common_width
from fedkd.core import seeds
from fedkd.core.lazy import torch
from fedkd.core.tensors import UInt8, put, take

if TYPE_CHECKING:
    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FedTGP(FedProto):
    """FedTGP (Zhang et al., 2024): FedProto with prototypes from a small network that the server trains.

    It minimizes the cross-entropy of -distance between the clients' class means and the prototypes, where the distance
    to the own class has a margin: the largest distance of a class to its nearest other one, at most ``margin``. Class
    means are uploaded with one byte for each class, whether the client has it; counts are not.
    """

    margin: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 100.0
    server_epochs: PositiveInt = 100

    def initial_state(self, setup: Setup) -> Tensors:
        from fedkd.training import prototypes

        width, seed = common_width(setup, "fedtgp"), seeds.derive(setup.config.seed, "prototypes")
        return put("network", prototypes.initial_weights(setup.classes, width, seed))

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return {"prototypes": state["prototypes"]} if "prototypes" in state else {}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        known = message.get("prototypes")
        counts = torch.full((setup.classes,), int(known is not None))
        prototypes = torch.zeros(setup.classes, 1) if known is None else known
        update, memory = super().local_update(setup, client, {"prototypes": prototypes, "counts": counts})
        is_present = (update.tensors["counts"] > 0).to(torch.uint8)
        return Update({"prototypes": update.tensors["prototypes"], "present": is_present}, update.examples), memory

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {
            "prototypes": (setup.classes, common_width(setup, "fedtgp")),
            "present": UInt8((setup.classes,)),
        }

    def check_update(self, setup: Setup, update: Update) -> str:
        return "" if (update.tensors["present"] <= 1).all() else "sent presences that are neither 0 nor 1"

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        from fedkd.training import prototypes

        means = torch.stack([update.tensors["prototypes"] for update in updates.values()])
        present = torch.stack([update.tensors["present"] for update in updates.values()]) > 0
        weights, trained = prototypes.trained(
            take("network", state),
            means,
            present,
            margin=self.margin,
            learning_rate=setup.config.learning_rate,
            batch_size=setup.config.batch_size,
            epochs=self.server_epochs,
            device=setup.trainer.device,
            seed=seed,
        )
        return {**put("network", weights), "prototypes": trained}
