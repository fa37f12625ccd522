"""SCAFFOLD (Karimireddy et al., 2020): FedAvg whose clients correct their gradients by control variates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.tensors import put, shapes, take, weighted_mean

if TYPE_CHECKING:
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """A client adds c - c_i to every gradient; c_i becomes the mean of its own gradients (option II).

    With momentum, the gradients in that mean have the weights with which they moved the model (`travel`), so
    that it stays one. Weights and the change of c_i go up, weights and c go down: twice FedAvg's bytes.
    Means over clients are plain, as in the paper. c is the mean of the c_i as long as every answer is counted, uncoded.
    """

    @property
    def one_model(self) -> bool:
        return True

    def init(self, kit: Kit) -> Tensors:
        return {**put("student", kit.initial(kit.student)), **put("control", kit.trainable(kit.student))}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        from fedkd.training import loop

        start, common = take("student", request), take("control", request)
        own = take("control", client.memory) or kit.trainable(client.model)
        slope = {name: common[name] - own[name] for name in common}
        weights = kit.fit(client, start, penalty=loop.linear(slope, kit.device))
        config = kit.config
        steps = config.local_epochs * ceil(len(client.data) / config.batch_size)
        moved = config.learning_rate * travel(steps, config.momentum)
        new = {n: ((start[n].double() - weights[n].double()) / moved - slope[n].double()).float() for n in own}
        change = {name: new[name] - own[name] for name in own}
        memory = {**put("model", weights), **put("control", new)}
        return Update({**put("student", weights), **put("control", change)}, len(client.data)), memory

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return shapes(state)

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        mean = weighted_mean([update.tensors for update in updates.values()], [1.0] * len(updates))
        share = len(updates) / kit.config.clients
        changes = take("control", mean)
        control = {n: (c.double() + share * changes[n].double()).float() for n, c in take("control", state).items()}
        return {**put("student", take("student", mean)), **put("control", control)}

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return take("student", state)


def travel(steps: int, momentum: float) -> float:
    """How far ``steps`` steps of SGD with momentum go along a constant gradient of 1, at learning rate 1.

    A gradient of step s moves the model in all later steps too: sum_s (1 - m^(K - s)) / (1 - m), s = 0 .. K - 1.
    """
    return sum((1 - momentum ** (steps - s)) / (1 - momentum) for s in range(steps))
