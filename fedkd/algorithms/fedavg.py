"""FedAvg (McMahan et al., 2017), FedProx (Li et al., 2020), FedAvgM (Hsu et al., 2019): weights in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms.base import DISTILLATION, Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, take, weighted_mean
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.loop import Penalty


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """FedAvg (McMahan et al., 2017): the mean of the clients' weights, weighted by their numbers of examples."""

    ignores: ClassVar[frozenset[str]] = DISTILLATION

    @property
    def needs_one_model(self) -> bool:
        return True

    def initial_state(self, setup: Setup) -> Tensors:
        return setup.trainer.initial_weights(setup.student)

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.trainer.train(client, message, penalty=self.penalty(setup, message))
        return Update(weights, len(client.data)), put("model", weights)

    def penalty(self, setup: Setup, start: Tensors) -> Penalty | None:
        """A term of the local loss of a client that starts from the global weights ``start``."""
        return None

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return setup.trainer.weight_shapes(setup.student)

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        examples = [update.examples for update in updates.values()]
        return weighted_mean([update.tensors for update in updates.values()], examples)

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return state


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx (Li et al., 2020): FedAvg with the proximal term mu / 2 * ||w - w_global||^2 in the local loss."""

    mu: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.01

    def penalty(self, setup: Setup, start: Tensors) -> Penalty | None:
        return Bound(self.proximal, start) if self.mu else None

    def proximal(self, parameters: Tensors, center: Tensors) -> Tensor:
        """Mu / 2 times the squared distance of the parameters from ``center``."""
        distances = [(p - center[n]).square().sum() for n, p in parameters.items()]
        return 0.5 * self.mu * torch.stack(distances).sum()


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvgM (Hsu et al., 2019): FedAvg with server momentum, v <- beta * v + (w - mean), w <- w - v."""

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def initial_state(self, setup: Setup) -> Tensors:
        student = setup.trainer.initial_weights(setup.student)
        return {**put("student", student), **put("velocity", setup.trainer.parameter_zeros(setup.student))}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return take("student", state)

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        mean = super().aggregate(setup, state, updates, seed)
        old, last = take("student", state), take("velocity", state)
        # Buffers are averaged: a running variance with momentum could overshoot below zero.
        steps = {name: self.beta * v.double() + (old[name].double() - mean[name].double()) for name, v in last.items()}
        student = {**mean, **{name: (old[name].double() - step).float() for name, step in steps.items()}}
        return {**put("student", student), **put("velocity", {name: step.float() for name, step in steps.items()})}

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)
