"""KT-pFL (Zhang et al., 2021): each client has its own mixture of all clients' soft labels, with learned weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import SERVER_DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.algorithms.ensemble import distill_locally
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import probabilities
from fedkd.core.tensors import integer, put

if TYPE_CHECKING:
    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class KTpFL(Algorithm):
    """KT-pFL (Zhang et al., 2021): each client distills from its own mixture of all clients' soft labels.

    Soft labels are at ``--temperature``. No global student.

    The coefficients minimize, for each participant and over the simplex, the squared distance of the mixture from
    its own labels, plus ``penalty`` times their squared distance from 1 / N. A client that was absent keeps its
    coefficients; its mixture uses those of the participants.
    """

    ignores: ClassVar[frozenset[str]] = SERVER_DISTILLATION | STUDENT | {"aggregator", "weighting"}
    penalty: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0
    local_distill_epochs: PositiveInt = 1

    def initial_state(self, setup: Setup) -> Tensors:
        count = setup.config.clients
        return {"round": integer(1), "coefficients": torch.full((count, count), 1 / count, dtype=torch.float64)}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        if "labels" not in state:
            return {"round": state["round"]}
        shares = state["coefficients"][client, state["present"]]
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
        (mixture,) = aggregators.mixed(state["labels"], shares[None])
        return {"round": state["round"], "prev": state["prev"], "probs": mixture.float()}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.local_weights(client)
        if "probs" in message:
            indices, objective = setup.proxy.subset(int(message["prev"])), setup.distillation.objective
            weights = distill_locally(
                setup, client, weights, indices, message["probs"], objective, self.local_distill_epochs
            )
        weights = setup.trainer.train(client, weights)
        logits = setup.proxy_logits(client.model, weights, int(message["round"]))
        probs = probabilities(logits, setup.distillation.temperature)
        return Update({"probs": probs}, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {"probs": setup.logits_shape}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        present = torch.tensor(list(updates))
        labels = torch.stack([update.tensors["probs"] for update in updates.values()])
        coefficients = state["coefficients"].clone()
        # Only the weight that each participant gives to the participants is redistributed.
        total = coefficients[present[:, None], present].sum(1, keepdim=True)
        coefficients[present[:, None], present] = total * aggregators.mixing(labels, penalty=self.penalty)
        return {
            "round": state["round"] + 1,
            "prev": state["round"],
            "coefficients": coefficients,
            "present": present,
            "labels": labels,
        }
