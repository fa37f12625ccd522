"""Ensemble distillation on a proxy set: logits up, a global student below the teacher.

The server step of FedDF (Lin et al., 2020) fed by the uplink of FedMD (Li and Wang, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from fedkd.algorithm import Algorithm, Client, Update
from fedkd.seeds import derive
from fedkd.tensors import integer, put, take

if TYPE_CHECKING:
    from fedkd.kit import Kit
    from fedkd.tensors import Tensors


@dataclass(frozen=True)
class Ensemble(Algorithm):
    """Clients answer the proxy images; the server distills the teacher made of their answers.

    With ``feedback`` the teacher's soft labels go down, and a client digests them before it trains.
    """

    feedback: bool = False
    digest_epochs: PositiveInt = 1

    def init(self, kit: Kit) -> Tensors:
        return {"round": integer(1), **put("student", kit.initial(kit.student))}

    def ask(self, kit: Kit, state: Tensors) -> Tensors:
        down = ("round", "told", "probs") if self.feedback else ("round",)
        return {name: state[name] for name in down if name in state}

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.own(client)
        if "probs" in request:
            rows, seed = kit.subset(int(request["told"])), derive(client.seed, "digest")
            weights = kit.distill(client.model, weights, rows, request["probs"], epochs=self.digest_epochs, seed=seed)
        weights = kit.fit(client, weights)
        logits = kit.answer(client, weights, int(request["round"]))
        return Update({"logits": logits}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit) -> Mapping[str, tuple[int, ...]]:
        return {"logits": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        probs = self.teacher(kit, [update.tensors["logits"] for update in updates.values()])
        student = kit.distill(
            kit.student,
            take("student", state),
            kit.subset(int(state["round"])),
            probs,
            epochs=kit.config.distill_epochs,
            seed=seed,
        )
        return {"round": state["round"] + 1, "told": state["round"], "probs": probs, **put("student", student)}

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return take("student", state)
