"""A larger mentor on each client, which never leaves it, and a small student that is averaged.

After FedKD (Wu et al., 2022), one way only: there the mentor learns from the student too, and what is sent is
compressed by singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedkd import models
from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core import specs
from fedkd.core.tensors import put, take
from fedkd.training.terms import Term, Weight

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Mentor(FedAvg):
    """FedAvg of students that learn from labels and from their client's mentor, by a term of `fedkd.distill`.

    The mentor trains on the client's rows first, for as many epochs. It is remembered with the term's adapters.
    """

    model: str = "resnet20"
    term: str = "features"
    kind: str = ""
    weight: Weight | None = None

    def __post_init__(self) -> None:
        specs.bind("model", self.model, models.RESERVED)
        if not self.pull.taught:
            raise ValueError(f"term {self.term} needs no mentor")

    @property
    def pull(self) -> Term:
        """The term."""
        given = {"kind": self.kind, "weight": self.weight}
        options = ",".join(f"{key}={value}" for key, value in given.items() if value not in ("", None))
        term: Term = specs.call("distillation", f"{self.term}:{options}" if options else self.term)
        return term

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        held = take("mentor", client.memory) or kit.initial(self.model)
        mentor = kit.fit(replace(client, model=self.model), held)
        adapters = take("adapters", client.memory)
        weights, adapters = kit.fit_taught(client, request, (self.model, mentor), self.pull, adapters)
        memory = {**put("model", weights), **put("mentor", mentor), **put("adapters", adapters)}
        return Update(weights, len(client.data)), memory
