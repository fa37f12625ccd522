"""FedBE (Chen and Chao, 2020): the ensemble also holds models drawn from a distribution over the clients' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.weight_ensemble import ServerStep, WeightEnsemble
from fedkd.core.lazy import torch
from fedkd.core.seeds import generator
from fedkd.core.tensors import weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup, Update
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class FedBE(WeightEnsemble):
    """FedBE (Chen and Chao, 2020): FedDF whose ensemble also holds the mean and ``samples`` models around it.

    ``posterior="gaussian"`` has the clients' mean and variance of each weight; ``"dirichlet"`` draws convex
    combinations of the clients' models. Mean probabilities are sharpened, p^(1 / sharpen), and the weights are
    averaged over the epochs of distillation.
    """

    ignores: ClassVar[frozenset[str]] = WeightEnsemble.ignores | {"weighting"}
    posterior: Literal["gaussian", "dirichlet"] = "gaussian"
    samples: PositiveInt = 10
    sharpen: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.5

    @property
    def needs_one_model(self) -> bool:
        return True

    @property
    def server_step(self) -> ServerStep:
        return ServerStep(self.sharpened_mean, self.targets, average_epochs=True)

    def targets(self, setup: Setup, updates: Mapping[int, Update], logits: Tensor, images: Tensor, seed: int) -> Tensor:
        """The sharpened mean of clients, their mean and the drawn models [R, C]."""
        clients, examples = [u.tensors for u in updates.values()], [u.examples for u in updates.values()]
        names = list(setup.trainer.parameter_zeros(setup.student))
        drawn = drawn_models(clients, examples, names, self.samples, self.posterior, seed)
        others = [
            setup.trainer.predict(setup.student, weights, images)
            for weights in (weighted_mean(clients, examples), *drawn)
        ]
        return self.sharpened_mean(torch.stack([*logits, *others]), torch.empty(0))

    def sharpened_mean(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The sharpened mean probabilities [N, C]; all models have the same weight, whatever ``weights`` is."""
        return aggregators.beta_era(logits, torch.ones(len(logits), 1), beta=1 / self.sharpen)


def drawn_models(
    clients: Sequence[Tensors], examples: Sequence[int], names: Sequence[str], count: int, posterior: str, seed: int
) -> list[dict[str, Tensor]]:
    """Models drawn from a distribution over the clients' models.

    Under a Gaussian, tensors that are not in ``names`` are the mean: a drawn running variance could be negative.
    """
    source = generator(seed, "posterior")
    if posterior == "dirichlet":
        exponential = torch.empty(count, len(clients), dtype=torch.float64).exponential_(generator=source)
        return [weighted_mean(clients, shares.tolist()) for shares in exponential / exponential.sum(1, keepdim=True)]
    mean = weighted_mean(clients, examples)
    floats = {name: mean[name].double() for name in names}
    squares = [{name: (model[name].double() - center).square() for name, center in floats.items()} for model in clients]
    deviation = {name: square.sqrt() for name, square in weighted_mean(squares, examples).items()}

    def draw() -> dict[str, Tensor]:
        noise = {n: torch.randn(c.shape, dtype=torch.float64, generator=source) for n, c in floats.items()}
        return {**mean, **{name: (c + deviation[name] * noise[name]).float() for name, c in floats.items()}}

    return [draw() for _ in range(count)]
