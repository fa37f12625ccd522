"""Weights up, an ensemble of them on the server: FedDF, FedBE and Fed-ET.

Only the server needs the proxy set. A model of each architecture is averaged and comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.errors import RunError
from fedkd.core.lazy import torch
from fedkd.core.seeds import derive, generator
from fedkd.core.tensors import integer, put, shapes, take, weighted_mean
from fedkd.training.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedDF(Algorithm):
    """Each architecture's mean is distilled from all clients' mean logits (Lin et al., 2020, algorithms 1 and 3).

    The student, if it has an architecture of its own, continues from the last round. Of the paper's server step,
    what is not here: cosine decay, early stopping on validation, dropping of bad clients.
    """

    #: Whether the student is apart even if a client has its architecture, and alone is distilled.
    apart: ClassVar[bool] = False
    #: Whether the weights after each epoch of distillation are averaged.
    average: ClassVar[bool] = False

    def init(self, kit: Kit) -> Tensors:
        state = {"round": integer(1)}
        for place, model in self.seats(kit).items():
            state |= put(place, kit.initial(model))
        return state

    def seats(self, kit: Kit) -> dict[str, str]:
        """The server's models: where each one lies in the state, and its spec."""
        groups = {f"group{place}": model for place, model in enumerate(dict.fromkeys(kit.models))}
        return groups if kit.student in groups.values() and not self.apart else {**groups, "student": kit.student}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return take(self._group(kit, client), state)

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.fit(client, request)
        return Update(weights, len(client.data)), put("model", weights)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return shapes(self.ask(kit, state, client))

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        new, rows = {"round": state["round"] + 1}, kit.subset(int(state["round"]))
        logits = {c: kit.predict(kit.model_of(c), u.tensors, kit.proxy[rows]) for c, u in updates.items()}
        # Finite weights may have infinite answers: such a model is no member of anything.
        updates = {client: update for client, update in updates.items() if logits[client].isfinite().all()}
        if not updates:
            raise RunError("No client's model gives finite answers; lower --learning-rate.")
        targets = self.targets(kit, updates, torch.stack([logits[client] for client in updates]), rows, seed)
        for place, model in self.seats(kit).items():
            members = [u for client, u in updates.items() if place == self._group(kit, client)]
            weights = take(place, state)
            if members:
                weights = weighted_mean([u.tensors for u in members], [u.examples for u in members])
            if place == "student" or not self.apart:
                weights = kit.distill(
                    model,
                    weights,
                    rows,
                    targets,
                    epochs=kit.config.distill_epochs,
                    seed=derive(seed, place),
                    objective=cross_entropy,
                    average=self.average,
                )
            new |= put(place, weights)
        return new

    def targets(self, kit: Kit, updates: Mapping[int, Update], logits: Tensor, rows: Tensor, seed: int) -> Tensor:
        """What the server's models are distilled to [R, C], from the members' logits [K, R, C] on these rows."""
        return self.teacher(kit, list(logits), kit.votes([update.examples for update in updates.values()]))

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return aggregators.mean_logits(torch.stack(list(logits)), weights)

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        places = {model: place for place, model in self.seats(kit).items()}
        return take(places[kit.student], state)

    def _group(self, kit: Kit, client: int) -> str:
        return next(place for place, model in self.seats(kit).items() if model == kit.model_of(client))


@dataclass(frozen=True)
class FedBE(FedDF):
    """The ensemble also holds the clients' mean and ``samples`` models drawn around it (Chen and Chao, 2020).

    ``posterior="gaussian"`` has the clients' mean and variance of each weight; ``"dirichlet"`` draws convex
    combinations of the clients. Mean probabilities are sharpened, p^(1 / sharpen), and the student is averaged
    over the epochs of its distillation.
    """

    average: ClassVar[bool] = True
    posterior: Literal["gaussian", "dirichlet"] = "gaussian"
    samples: PositiveInt = 10
    sharpen: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.5

    @property
    def one_model(self) -> bool:
        return True

    def targets(self, kit: Kit, updates: Mapping[int, Update], logits: Tensor, rows: Tensor, seed: int) -> Tensor:
        held, examples = [u.tensors for u in updates.values()], [u.examples for u in updates.values()]
        drawn = sampled(held, examples, list(kit.trainable(kit.student)), self.samples, self.posterior, seed)
        more = [
            kit.predict(kit.student, weights, kit.proxy[rows]) for weights in (weighted_mean(held, examples), *drawn)
        ]
        return self.teacher(kit, [*logits, *more], torch.empty(0))

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Members count the same, whatever ``weights`` says."""
        return aggregators.beta_era(torch.stack(list(logits)), torch.ones(len(logits), 1), beta=1 / self.sharpen)


def sampled(
    models: Sequence[Tensors], examples: Sequence[int], names: Sequence[str], count: int, posterior: str, seed: int
) -> list[dict[str, Tensor]]:
    """Models drawn from a distribution over the clients' models; under a Gaussian what is not in ``names`` is the mean.

    A running variance must not be drawn: it could be negative.
    """
    source = generator(seed, "posterior")
    if posterior == "dirichlet":
        exponential = torch.empty(count, len(models), dtype=torch.float64).exponential_(generator=source)
        return [weighted_mean(models, shares.tolist()) for shares in exponential / exponential.sum(1, keepdim=True)]
    mean = weighted_mean(models, examples)
    floats = {name: mean[name].double() for name in names}
    squares = [{name: (model[name].double() - center).square() for name, center in floats.items()} for model in models]
    spread = {name: square.sqrt() for name, square in weighted_mean(squares, examples).items()}

    def draw() -> dict[str, Tensor]:
        noise = {n: torch.randn(c.shape, dtype=torch.float64, generator=source) for n, c in floats.items()}
        return {**mean, **{name: (c + spread[name] * noise[name]).float() for name, c in floats.items()}}

    return [draw() for _ in range(count)]


@dataclass(frozen=True)
class FedET(FedDF):
    """Small clients, a larger student: hard labels of a consensus, and ``diversity`` (Cho et al., 2022).

    The consensus weighs each client's logits by their variance over classes. The student minimizes the
    cross-entropy to its argmax plus diversity times that to the mean of the clients that disagree with it.
    Each architecture's mean comes back as in FedAvg; the paper's copy of representation layers is not here.
    """

    apart: ClassVar[bool] = True
    diversity: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.05

    def targets(self, kit: Kit, updates: Mapping[int, Update], logits: Tensor, rows: Tensor, seed: int) -> Tensor:
        weights = kit.votes([update.examples for update in updates.values()])
        label = self.teacher(kit, list(logits), weights).argmax(-1)
        disagrees = (logits.argmax(-1) != label).double()
        diverse = (disagrees[..., None] * logits.double().softmax(-1)).sum(0) / disagrees.sum(0).clamp_min(1)[:, None]
        hard = torch.nn.functional.one_hot(label, kit.classes)
        return (hard + self.diversity * diverse).float()

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return aggregators.variance(torch.stack(list(logits)), weights)
