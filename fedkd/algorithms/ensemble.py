"""Ensemble distillation on a proxy set: clients upload logits, the server distills the global student from them.

The server step of FedDF (Lin et al., 2020) with the uplink of FedMD (Li and Wang, 2019). Methods that differ in the
ensemble, in what is sent or in the local update are subclasses: DS-FL, CFD, Cronus, FedEMA, FedGEMS, Selective-FD,
SCARLET and density weighting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.soft_labels import SoftLabels, mean_probs, probabilities
from fedkd.core.tensors import integer, put, take
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Aggregator, Distillation, Setup
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.loop import Objective

Downlink = Literal["nothing", "labels", "student"]


@dataclass(frozen=True)
class Ensemble(Algorithm):
    """Clients upload logits on the proxy set; the server distills the student (server step: Lin et al., 2020).

    ``downlink`` is what clients receive in the next round: nothing; the teacher's soft labels, from which a client
    distills for ``local_distill_epochs`` before it trains; or the student's weights, from which it trains.
    """

    downlink: Downlink = "nothing"
    local_distill_epochs: PositiveInt = 1
    #: What clients upload: ``logits`` or ``probs``.
    uplink: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        if self.downlink != "labels" and self.local_distill_epochs != type(self).local_distill_epochs:
            raise ValueError("local-distill-epochs applies to downlink=labels")

    @property
    def needs_one_model(self) -> bool:
        return self.downlink == "student"

    def distillation(self, setup: Setup) -> Distillation:
        """The aggregator, loss and temperature of the method; by default those of the run."""
        return setup.distillation

    def initial_state(self, setup: Setup) -> Tensors:
        return {"round": integer(1), **put("student", setup.trainer.initial_weights(setup.student))}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        if self.downlink == "student":
            return {"round": state["round"], **put("student", take("student", state))}
        names = ("round", "prev", "probs") if self.downlink == "labels" else ("round",)
        return {name: state[name] for name in names if name in state}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = self.train_client(setup, client, message)
        logits = setup.proxy_logits(client.model, weights, int(message["round"]))
        labels = probabilities(logits) if self.uplink == "probs" else logits
        return Update({self.uplink: labels}, len(client.data)), put("model", weights)

    def train_client(self, setup: Setup, client: Client, message: Tensors) -> dict[str, Tensor]:
        """The client's weights after it has used what it received and trained on its own samples."""
        start = take("student", message) or self.distill_client(setup, client, setup.local_weights(client), message)
        return setup.trainer.train(client, start)

    def distill_client(self, setup: Setup, client: Client, weights: Tensors, message: Tensors) -> Tensors:
        """The client's weights after distillation from the soft labels in the message, if there are any."""
        if "probs" not in message:
            return weights
        return self.distill_on(setup, client, weights, setup.proxy.subset(int(message["prev"])), message["probs"])

    def distill_on(self, setup: Setup, client: Client, weights: Tensors, indices: Tensor, probs: Tensor) -> Tensors:
        """The client's weights after distillation from probs [R, C] on these proxy samples [R]."""
        return distill_locally(
            setup, client, weights, indices, probs, self.distillation(setup).objective, self.local_distill_epochs
        )

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {self.uplink: setup.logits_shape}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        logits = uploaded_logits([update.tensors for update in updates.values()])
        probs = self.teacher_probs(setup, logits, self.client_weights(setup, updates))
        return {
            **self.distill_student(setup, state, setup.proxy.subset(int(state["round"])), probs, seed),
            "probs": probs,
        }

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return self.distillation(setup).teacher_probs(logits, weights)

    def client_weights(self, setup: Setup, updates: Mapping[int, Update]) -> Tensor:
        """The weights of the clients in the ensemble [K, 1 or N]."""
        return setup.distillation.client_weights([update.examples for update in updates.values()])

    def distill_student(
        self, setup: Setup, state: Tensors, indices: Tensor, probs: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """The state after the student was distilled from probs [R, C] on these proxy samples [R]."""
        student = take("student", state)
        if len(indices):
            soft_labels = SoftLabels(setup.proxy.select(indices), probs)
            objective = self.distillation(setup).objective
            student = setup.distill(setup.student, student, soft_labels, objective, seed=seed)
        return {**state, "round": state["round"] + 1, "prev": state["round"], **put("student", student)}

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)


def soft_cross_entropy(setup: Setup, aggregator: Aggregator = mean_probs) -> Distillation:
    """The soft cross-entropy at T = 1 with a method's own aggregator, whatever --loss and --temperature are."""
    return replace(setup.distillation, aggregator=aggregator, loss=cross_entropy, temperature=1.0)


def distill_locally(
    setup: Setup, client: Client, weights: Tensors, indices: Tensor, targets: Tensor, objective: Objective, epochs: int
) -> dict[str, Tensor]:
    """A client's weights after local distillation from targets [R, C] on the proxy samples [R]."""
    return setup.trainer.distill(
        client.model,
        weights,
        SoftLabels(setup.proxy.select(indices), targets),
        objective,
        epochs=epochs,
        seed=client.derive("digest"),
    )


def uploaded_logits(uploads: Sequence[Tensors]) -> list[Tensor]:
    """The clients' logits [N, C]. log p is a logit of p, so that the same aggregators serve both."""
    return [u["logits"] if "logits" in u else u["probs"].clamp_min(1e-30).log() for u in uploads]
