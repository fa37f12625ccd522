"""FedAvg (McMahan et al., 2017) and FedProx (Li et al., 2020): weights up, their mean down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

from fedkd.algorithm import Algorithm, Client, Update
from fedkd.tensors import put, weighted_mean

if TYPE_CHECKING:
    from fedkd.kit import Kit
    from fedkd.tensors import Tensors


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """The global model is the mean of the local ones, weighted by numbers of examples."""

    one_model: ClassVar[bool] = True

    def init(self, kit: Kit) -> Tensors:
        return kit.initial(kit.student)

    def ask(self, kit: Kit, state: Tensors) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.fit(client, request, mu=self.proximal)
        return Update(weights, len(client.data)), put("model", weights)

    def sends(self, kit: Kit) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in kit.initial(kit.student).items()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        examples = [update.examples for update in updates.values()]
        return weighted_mean([update.tensors for update in updates.values()], examples)

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        return state

    @property
    def proximal(self) -> float:
        return 0.0


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose local training is held near the global model by mu / 2 * ||w - w_global||^2."""

    mu: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.01

    @property
    def proximal(self) -> float:
        return self.mu
