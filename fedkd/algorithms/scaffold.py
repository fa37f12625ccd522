"""SCAFFOLD (Karimireddy et al., 2020): FedAvg whose clients correct their gradients by control variates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fedkd.algorithms.base import DISTILLATION, Algorithm, Client, Update
from fedkd.core import specs
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, shapes, take, weighted_mean
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy et al., 2020): clients add c - c_i to every gradient.

    c_i becomes the mean of the client's own gradients (option II).

    With momentum, the gradients in that mean have the weights with which they moved the model (`total_step`), so
    that it stays a mean. Weights and the change of c_i are uploaded, weights and c are broadcast: twice FedAvg's
    bytes. Means over clients are unweighted, as in the paper; with ``weighting="size"``, that of the weights is
    FedAvg's, as in FedNTD's code. c is the mean of the c_i only if every update is accepted and no codec rounds it.
    """

    weighting: Literal["uniform", "size"] = "uniform"

    ignores: ClassVar[frozenset[str]] = DISTILLATION
    assumes_sgd: ClassVar[bool] = True

    @property
    def needs_one_model(self) -> bool:
        return True

    def initial_state(self, setup: Setup) -> Tensors:
        return {
            **put("student", setup.trainer.initial_weights(setup.student)),
            **put("control", setup.trainer.parameter_zeros(setup.student)),
        }

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        start, common = take("student", message), take("control", message)
        own = take("control", client.memory) or setup.trainer.parameter_zeros(client.model)
        slope = {name: common[name] - own[name] for name in common}
        weights = setup.trainer.train(client, start, penalty=Bound(linear, slope))
        steps, config = setup.trainer.steps(client), setup.config
        is_nesterov = specs.built_in("optimizer", config.optimizer).keywords.get("nesterov", False)
        moved = setup.trainer.learning_rate(client) * total_step(steps, config.momentum, is_nesterov)
        new = own  # without a step there is no gradient
        if moved:
            new = {n: ((start[n].double() - weights[n].double()) / moved - slope[n].double()).float() for n in own}
        change = {name: new[name] - own[name] for name in own}
        memory = {**put("model", weights), **put("control", new)}
        return Update({**put("student", weights), **put("control", change)}, len(client.data)), memory

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        control = shapes(setup.trainer.parameter_zeros(setup.student))
        named = {"student": setup.trainer.weight_shapes(setup.student), "control": control}
        return {f"{prefix}/{name}": shape for prefix, those in named.items() for name, shape in those.items()}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        sizes = [update.examples if self.weighting == "size" else 1.0 for update in updates.values()]
        weights = weighted_mean([take("student", update.tensors) for update in updates.values()], sizes)
        changes = weighted_mean([take("control", update.tensors) for update in updates.values()], [1.0] * len(updates))
        share = len(updates) / setup.config.clients
        control = {n: (c.double() + share * changes[n].double()).float() for n, c in take("control", state).items()}
        return {**put("student", weights), **put("control", control)}

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)


def linear(parameters: Tensors, slope: Tensors) -> Tensor:
    """<slope, parameters>, whose gradient is ``slope``."""
    return torch.stack([(p * slope[n]).sum() for n, p in parameters.items()]).sum()


def total_step(steps: int, momentum: float, is_nesterov: bool = False) -> float:
    """The distance that ``steps`` steps of SGD with momentum move along a constant gradient of 1 at learning rate 1.

    The gradient of step s moves the model in all later steps too: sum_s (1 - m^(K - s)) / (1 - m), s = 0 .. K - 1; with
    Nesterov's momentum, as if there was one step more: sum_s (1 - m^(K - s + 1)) / (1 - m).
    """
    return sum((1 - momentum ** (steps - s + is_nesterov)) / (1 - momentum) for s in range(steps))
