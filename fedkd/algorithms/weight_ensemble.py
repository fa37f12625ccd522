"""Clients upload weights; the server distills models from the ensemble of the clients' models.

FedDF, FedBE and Fed-ET are this protocol with different server steps (`ServerStep`). Only the server needs the proxy
set. The weights of each architecture are averaged and sent back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.algorithms.base import Algorithm, Client, Setup, Update
from fedkd.core.errors import RunError
from fedkd.core.lazy import torch
from fedkd.core.seeds import derive
from fedkd.core.soft_labels import SoftLabels
from fedkd.core.tensors import integer, put, take, weighted_mean
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Aggregator
    from fedkd.core.tensors import Shapes, Tensors

    #: (setup, updates, the clients' logits [K, R, C], their proxy images [R, H, W, 3], seed) -> targets [R, C]
    Targets = Callable[[Setup, Mapping[int, Update], Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class ServerStep:
    """What distinguishes the methods: the ensemble, the targets, and which models are distilled, and how.

    With ``separate_student`` the global student is a model of its own even if a client has its architecture, and
    only it is distilled. With ``average_epochs`` the weights after each epoch of distillation are averaged.
    """

    aggregator: Aggregator
    targets: Targets
    separate_student: bool = False
    average_epochs: bool = False


class WeightEnsemble(Algorithm):
    """The protocol that FedDF, FedBE and Fed-ET share."""

    ignores: ClassVar[frozenset[str]] = frozenset(
        {"aggregator", "temperature", "loss", "uplink_codec", "downlink_codec"}
    )

    @property
    @abstractmethod
    def server_step(self) -> ServerStep:
        """The server step of the method."""

    def initial_state(self, setup: Setup) -> Tensors:
        state = {"round": integer(1)}
        for name, model in self._server_models(setup).items():
            state |= put(name, setup.trainer.initial_weights(model))
        return state

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return take(self._group(setup, client), state)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.trainer.train(client, message)
        return Update(weights, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return setup.trainer.weight_shapes(setup.model_of(client))

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        step, images = self.server_step, setup.proxy.select(setup.proxy.subset(int(state["round"])))
        logits = {c: setup.trainer.predict(setup.model_of(c), u.tensors, images) for c, u in updates.items()}
        # Finite weights may give infinite logits; such a model is not part of the ensemble.
        updates = {client: update for client, update in updates.items() if logits[client].isfinite().all()}
        if not updates:
            raise RunError("No client's model gives finite logits; lower --learning-rate.")
        averaged, updates = self.selected(setup, updates)
        stacked = torch.stack([logits[client] for client in updates])
        soft_labels = SoftLabels(images, step.targets(setup, updates, stacked, images, seed))
        new = {"round": state["round"] + 1}
        for name, model in self._server_models(setup).items():
            weights = take(name, state)
            if group := [update for client, update in averaged.items() if name == self._group(setup, client)]:
                weights = weighted_mean([u.tensors for u in group], [u.examples for u in group])
            if name == "student" or not step.separate_student:
                own_seed, average = derive(seed, name), step.average_epochs
                weights = setup.distill(model, weights, soft_labels, cross_entropy, seed=own_seed, average=average)
            new |= put(name, weights)
        return new

    def selected(
        self, setup: Setup, updates: Mapping[int, Update]
    ) -> tuple[Mapping[int, Update], Mapping[int, Update]]:
        """The updates that are averaged, and those that are the ensemble; by default all of them."""
        return updates, updates

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return self.server_step.aggregator(torch.stack(list(logits)), weights)

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        names = {model: name for name, model in self._server_models(setup).items()}
        return take(names[setup.student], state)

    def _server_models(self, setup: Setup) -> dict[str, str]:
        """The server's models: the name of each in the state, and its spec."""
        groups = {f"group{place}": model for place, model in enumerate(dict.fromkeys(setup.models))}
        if setup.student in groups.values() and not self.server_step.separate_student:
            return groups
        return {**groups, "student": setup.student}

    def _group(self, setup: Setup, client: int) -> str:
        return next(name for name, model in self._server_models(setup).items() if model == setup.model_of(client))
