"""Ensemble distillation on a proxy set: soft labels up, a global student below the teacher.

The server step of FedDF (Lin et al., 2020) fed by the uplink of FedMD (Li and Wang, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.tensors import integer, put, take
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit

Down = Literal["nothing", "labels", "student"]


@dataclass(frozen=True)
class Ensemble(Algorithm):
    """Clients answer the proxy images; the server distills the teacher made of their answers.

    ``down`` is what they get for it with the next request: nothing; the teacher's soft labels, which
    a client digests before it trains; or the student's weights, from which it trains.
    """

    down: Down = "nothing"
    digest_epochs: PositiveInt = 1
    #: What clients send: logits, or probs.
    said: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        if self.down != "labels" and self.digest_epochs != type(self).digest_epochs:
            raise ValueError("digest_epochs is for down=labels")

    @property
    def one_model(self) -> bool:
        return self.down == "student"

    def init(self, kit: Kit) -> Tensors:
        return {"round": integer(1), **put("student", kit.initial(kit.student))}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        if self.down == "student":
            return {"round": state["round"], **put("student", take("student", state))}
        down = ("round", "told", "probs") if self.down == "labels" else ("round",)
        return {name: state[name] for name in down if name in state}

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = self.train(kit, client, request)
        said = _said(self.said, kit.answer(client, weights, int(request["round"])))
        return Update({self.said: said}, len(client.data)), put("model", weights)

    def train(self, kit: Kit, client: Client, request: Tensors) -> dict[str, Tensor]:
        """The client's weights after it took in what came down and trained on its rows."""
        return kit.fit(client, take("student", request) or self.digest(kit, client, kit.own(client), request))

    def digest(self, kit: Kit, client: Client, weights: Tensors, request: Tensors) -> Tensors:
        """The weights after distilling the soft labels that came down, if any did."""
        if "probs" not in request:
            return weights
        return kit.digest(client, weights, kit.subset(int(request["told"])), request["probs"], self.digest_epochs)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {self.said: kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        probs = self.teacher(kit, heard([update.tensors for update in updates.values()]), self.weigh(kit, updates))
        return {**self.learn(kit, state, kit.subset(int(state["round"])), probs, seed), "probs": probs}

    def weigh(self, kit: Kit, updates: Mapping[int, Update]) -> Tensor:
        """What the clients' answers weigh in the teacher [K, 1 or N]."""
        return kit.votes([update.examples for update in updates.values()])

    def learn(self, kit: Kit, state: Tensors, rows: Tensor, probs: Tensor, seed: int) -> dict[str, Tensor]:
        """The state after the student was distilled on the proxy's ``rows``."""
        student = take("student", state)
        if len(rows):
            student = kit.distill(kit.student, student, rows, probs, epochs=kit.config.distill_epochs, seed=seed)
        return {**state, "round": state["round"] + 1, "told": state["round"], **put("student", student)}

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return take("student", state)


@dataclass(frozen=True)
class OwnTeacher(Ensemble):
    """An `Ensemble` of probabilities and the soft cross-entropy, with no temperature and its own teacher.

    Whatever ``--aggregator``, ``--loss`` and ``--temperature`` say: the methods below fix them.
    """

    down: Down = "labels"
    said: ClassVar[str] = "probs"

    def train(self, kit: Kit, client: Client, request: Tensors) -> dict[str, Tensor]:
        return super().train(self.plain(kit), client, request)

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        return super().tell(self.plain(kit), state, updates, seed)

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return self.plain(kit).ensemble(logits, weights)

    def plain(self, kit: Kit) -> Kit:
        """The kit with the method's own teacher and loss."""
        config = replace(kit.config, temperature=1.0)
        return replace(kit, config=config, loss=cross_entropy, aggregator=self.aggregate)

    def aggregate(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The teacher's probs [N, C]; the mean of the clients'."""
        return aggregators.mean_probs(logits, weights)


def _said(kind: str, logits: Tensor) -> Tensor:
    return aggregators.probabilities(logits) if kind == "probs" else logits


def heard(updates: Sequence[Tensors]) -> list[Tensor]:
    """The clients' logits [N, C]. log p is a logit of p, so one set of aggregators serves both."""
    return [u["logits"] if "logits" in u else u["probs"].clamp_min(1e-30).log() for u in updates]
