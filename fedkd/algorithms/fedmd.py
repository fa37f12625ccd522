"""FedMD (Li and Wang, 2019): class scores up, their mean down, no model on the server.

The paper's first phase, training on the public set's own labels, is left out: the proxy is taken
as unlabeled here (docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from fedkd.algorithm import Algorithm, Client, Update
from fedkd.losses.logits import logit_mae
from fedkd.seeds import derive
from fedkd.tensors import integer, put, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.kit import Kit
    from fedkd.tensors import Tensors


@dataclass(frozen=True)
class FedMD(Algorithm):
    """A client digests the mean scores (mean absolute error), revisits its data, and answers."""

    digest_epochs: PositiveInt = 1

    def init(self, kit: Kit) -> Tensors:
        return {"round": integer(1)}

    def ask(self, kit: Kit, state: Tensors) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.own(client)
        if "logits" in request:
            weights = kit.distill(
                client.model,
                weights,
                kit.subset(int(request["told"])),
                request["logits"],
                epochs=self.digest_epochs,
                seed=derive(client.seed, "digest"),
                objective=logit_mae,
            )
        weights = kit.fit(client, weights)
        logits = kit.answer(client, weights, int(request["round"]))
        return Update({"logits": logits}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit) -> Mapping[str, tuple[int, ...]]:
        return {"logits": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        consensus = weighted_mean([update.tensors for update in updates.values()], [1.0] * len(updates))
        return {"round": state["round"] + 1, "told": state["round"], "logits": consensus["logits"]}

    def teacher(self, kit: Kit, logits: Sequence[Tensor]) -> Tensor:
        return weighted_mean([{"": scores} for scores in logits], [1.0] * len(logits))[""].softmax(-1)
