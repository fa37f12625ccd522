"""FedAvg (McMahan et al., 2017), FedProx (Li et al., 2020), FedAvgM (Hsu et al., 2019): weights up and down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.tensors import put, shapes, take, weighted_mean

if TYPE_CHECKING:
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.loop import Penalty
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """The global model is the mean of the local ones, weighted by numbers of examples."""

    @property
    def one_model(self) -> bool:
        return True

    def init(self, kit: Kit) -> Tensors:
        return kit.initial(kit.student)

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.fit(client, request, penalty=self.penalty(kit, request))
        return Update(weights, len(client.data)), put("model", weights)

    def penalty(self, kit: Kit, start: Tensors) -> Penalty | None:
        """What is added to the local loss of a client that starts from the global model."""
        return None

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return shapes(self.ask(kit, state, client))

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        examples = [update.examples for update in updates.values()]
        return weighted_mean([update.tensors for update in updates.values()], examples)

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return state


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose local training is held near the global model by mu / 2 * ||w - w_global||^2."""

    mu: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.01

    def penalty(self, kit: Kit, start: Tensors) -> Penalty | None:
        from fedkd.training import loop

        return loop.proximal(self.mu, start, kit.device) if self.mu else None


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg whose server keeps a velocity: v <- beta * v + (w - mean), w <- w - v."""

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def init(self, kit: Kit) -> Tensors:
        student = kit.initial(kit.student)
        return {**put("student", student), **put("velocity", kit.trainable(kit.student))}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return take("student", state)

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        mean, old, last = super().tell(kit, state, updates, seed), take("student", state), take("velocity", state)
        # Buffers are averaged: a running variance with momentum could overshoot below zero.
        steps = {name: self.beta * v.double() + (old[name].double() - mean[name].double()) for name, v in last.items()}
        student = {**mean, **{name: (old[name].double() - step).float() for name, step in steps.items()}}
        return {**put("student", student), **put("velocity", {name: step.float() for name, step in steps.items()})}

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return take("student", state)
