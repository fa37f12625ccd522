"""KT-pFL (Zhang et al., 2021): every client has a mixture of its own of all clients' labels, with learned weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.tensors import integer, put

if TYPE_CHECKING:
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class KTpFL(Algorithm):
    """Soft labels at ``--temperature`` up, the client's own mixture down, which it digests. No global student.

    The coefficients minimize, for each participant and over the simplex, the squared distance of mixture and
    own labels, plus ``penalty`` times their squared distance from 1 / N. Clients that were absent are served
    by the coefficients they had, of those who were there.
    """

    penalty: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0
    digest_epochs: PositiveInt = 1

    def init(self, kit: Kit) -> Tensors:
        count = kit.config.clients
        return {"round": integer(1), "coefficients": torch.full((count, count), 1 / count, dtype=torch.float64)}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        if "labels" not in state:
            return {"round": state["round"]}
        shares = state["coefficients"][client, state["present"]]
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
        (mixture,) = aggregators.mixed(state["labels"], shares[None])
        return {"round": state["round"], "told": state["told"], "probs": mixture.float()}

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.own(client)
        if "probs" in request:
            weights = kit.digest(
                client, weights, kit.subset(int(request["told"])), request["probs"], self.digest_epochs
            )
        weights = kit.fit(client, weights)
        logits = kit.answer(client, weights, int(request["round"]))
        probs = aggregators.probabilities(logits, kit.config.temperature)
        return Update({"probs": probs}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {"probs": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        present = torch.tensor(list(updates))
        labels = torch.stack([update.tensors["probs"] for update in updates.values()])
        coefficients = state["coefficients"].clone()
        held = coefficients[present[:, None], present].sum(1, keepdim=True)  # what is not spoken of stays as it is
        coefficients[present[:, None], present] = held * aggregators.mixing(labels, penalty=self.penalty)
        return {
            "round": state["round"] + 1,
            "told": state["round"],
            "coefficients": coefficients,
            "present": present,
            "labels": labels,
        }
