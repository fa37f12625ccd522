"""FedProto (Tan et al., 2022): no proxy set; the mean embedding of each class in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms.base import DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.algorithms.fd import class_means
from fedkd.core.errors import UsageError
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, shapes
from fedkd.training.objectives import Bound, mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FedProto(Algorithm):
    """FedProto (Tan et al., 2022): mean embeddings of each class are exchanged; no proxy set, no global student.

    A client minimizes CE + weight * mean((embedding - its class's prototype)^2).

    The number of samples of each class is uploaded as well, as the paper's weights need it. Models may differ, but
    embeddings (the input of the last linear layer) must have one width.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | STUDENT | {"label_smoothing"}
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def initial_state(self, setup: Setup) -> Tensors:
        width = common_width(setup, "fedproto")
        return {
            "prototypes": torch.zeros(setup.classes, width),
            "counts": torch.zeros(setup.classes, dtype=torch.int64),
        }

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        known = {"prototypes": message["prototypes"], "is_known": message["counts"] > 0}
        objective = Bound(self.objective, known)
        weights = setup.trainer.train(client, setup.local_weights(client), objective=objective, with_embeddings=True)
        embeddings = setup.trainer.embed(client.model, weights, client.data.pixels)
        means, counts = class_means(embeddings, client.data.labels, setup.classes)
        return Update({"prototypes": means, "counts": counts}, len(client.data)), put("model", weights)

    @mean_over_samples
    def objective(self, output: tuple[Tensor, Tensor], labels: Tensor, tensors: Tensors) -> Tensor:
        """The loss of a client for its prototypes [C, D], of the classes where ``is_known`` [C] is true."""
        logits, embedding = output
        prototypes, is_known = tensors["prototypes"], tensors["is_known"]
        distance = (embedding - prototypes[labels]).square().mean(-1) * is_known[labels]
        return torch.nn.functional.cross_entropy(logits, labels) + self.weight * distance.mean()

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return shapes(self.initial_state(setup))

    def check_update(self, setup: Setup, update: Update) -> str:
        return check_counts(update)

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        total = torch.stack([update.tensors["counts"] for update in updates.values()]).sum(0)
        return {
            "prototypes": merged("prototypes", state, updates),
            "counts": torch.where(total > 0, total, state["counts"]),
        }


def merged(name: str, state: Tensors, updates: Mapping[int, Update]) -> Tensor:
    """The clients' means [C, D] of this name, weighted by their counts; those of classes that none has are kept."""
    counts = torch.stack([update.tensors["counts"] for update in updates.values()])
    means = torch.stack([update.tensors[name] for update in updates.values()]).double()
    total = counts.sum(0)
    mean = (counts[..., None] * means).sum(0) / total.clamp_min(1)[:, None]
    return torch.where((total > 0)[:, None], mean.float(), state[name])


def check_counts(update: Update) -> str:
    """What is wrong with the ``counts`` [C] of the samples of each class in an update; empty if nothing is."""
    counts = update.tensors["counts"]
    return "" if (counts >= 0).all() and counts.sum() == update.examples else "sent counts that do not add up"


def head_of(setup: Setup, name: str) -> str:
    """The name of the layer of the global student that maps embeddings to logits.

    Raises:
        UsageError: it has no such layer; the message is about the method ``name``.

    """
    try:
        return setup.trainer.head(setup.student, setup.proxy.images)
    except ValueError as error:
        raise UsageError(f"{name} cannot use --model {setup.student}: {error}.") from error


def head_logits(weights: Tensors, head: str, embeddings: Tensor) -> Tensor:
    """The logits [N, C] that the layer ``head`` of a model with these weights gives for embeddings [N, D]."""
    return torch.nn.functional.linear(embeddings, weights[f"{head}.weight"], weights.get(f"{head}.bias"))


def common_width(setup: Setup, name: str) -> int:
    """The width of the embeddings of all clients' models.

    Raises:
        UsageError: they differ, or a model has no embedding; the message is about the method ``name``.

    """
    widths = {model: _width(setup, model, name) for model in setup.models}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} ({model})" for model, width in widths.items())
        raise UsageError(f"{name} needs embeddings of one width, these have {listed}; change --model.")
    return widths[setup.models[0]]


def _width(setup: Setup, model: str, name: str) -> int:
    try:
        return setup.trainer.embed(model, setup.trainer.initial_weights(model), setup.proxy.images[:1]).shape[1]
    except ValueError as error:
        raise UsageError(f"{name} cannot use --model {model}: {error}.") from error
