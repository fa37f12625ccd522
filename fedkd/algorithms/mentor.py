"""A larger mentor on each client, which is never sent, and a small student that is averaged.

After FedKD (Wu et al., 2022), in one direction only. In `fml` the mentor learns from the student, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core import quotes, specs
from fedkd.core.tensors import put, take
from fedkd.training import models
from fedkd.training.terms import Term, Weight

if TYPE_CHECKING:
    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class Mentor(FedAvg):
    """FedAvg of small students that learn from a larger mentor on their client (after FedKD: Wu et al., 2022).

    They learn by a loss term of `fedkd.distill`. The mentor trains on the client's samples first, for as many
    epochs. The client's memory keeps it, with the adapters of the term.
    """

    model: str = "resnet20"
    term: str = "features"
    kind: str = ""
    weight: Weight | None = None

    def __post_init__(self) -> None:
        specs.bind("model", self.model, models.RESERVED)
        if not self.loss_term.needs_teacher:
            raise ValueError(f"term {self.term} needs no mentor")

    @property
    def loss_term(self) -> Term:
        """The loss term."""
        given = {"kind": self.kind, "weight": self.weight}
        named = {key: quotes.quoted(str(value)) for key, value in given.items() if value not in ("", None)}
        options = ",".join(map("=".join, named.items()))
        term: Term = specs.call("distillation", f"{self.term}:{options}" if options else self.term)
        return term

    @property
    def private_models(self) -> tuple[str, ...]:
        return (self.model,)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        mentor = take("mentor", client.memory) or setup.trainer.initial_weights(self.model)
        mentor = setup.trainer.train(replace(client, model=self.model), mentor)
        weights, adapters = setup.trainer.train_with_teacher(
            client, message, (self.model, mentor), self.loss_term, take("adapters", client.memory)
        )
        memory = {**put("model", weights), **put("mentor", mentor), **put("adapters", adapters)}
        return Update(weights, len(client.data)), memory
