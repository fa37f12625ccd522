"""FedGKT (He et al., 2020): clients send feature maps of private samples, on which the server trains further layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms.base import DISTILLATION, SERVER_DISTILLATION, Algorithm, Client, Update
from fedkd.core import seeds
from fedkd.core.errors import UsageError
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import SoftLabels, probabilities
from fedkd.core.tensors import Int64, put, take
from fedkd.core.values import Rate
from fedkd.training.losses.logits import cross_entropy, kl
from fedkd.training.objectives import Softened, mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FedGKT(Algorithm):
    """FedGKT (He et al., 2020): feature maps, outputs and labels of private samples leave the client; no proxy set.

    Both sides minimize CE(label) + weight * T^2 KL(the other side's output at T || own). A client trains its model on
    images. The server trains the layers of the student after its first ReLU, on the feature maps that clients send, and
    sends each client the outputs for its own samples. A client with more than ``samples`` samples sends so many.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION - SERVER_DISTILLATION - {
        *("distill_batch_size", "distill_learning_rate"),
    } | {"patience", "label_smoothing"}
    private_features: bool = False
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0
    temperature: Rate = 3.0
    samples: PositiveInt = 5000

    def __post_init__(self) -> None:
        if not self.private_features:
            raise UsageError(
                "fedgkt sends feature maps, logits and labels of private samples to the server; "
                "pass fedgkt:private-features=true if that is what you want."
            )

    def initial_state(self, setup: Setup) -> Tensors:
        if setup.config.distill_patience:
            raise UsageError("fedgkt cannot use --distill-patience: the server has no feature maps of --validation.")
        student = _extractor(setup, setup.student)
        for model in setup.models:
            if _extractor(setup, model) != student:
                raise UsageError(
                    f"fedgkt needs models whose layers up to the first ReLU are those of the student; {model} has "
                    f"others than --student {setup.student}."
                )
        return put("student", setup.trainer.initial_weights(setup.student))

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        outputs = state.get(f"outputs/{client}")
        return {} if outputs is None else {"outputs": outputs}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        order = torch.randperm(len(client.data), generator=seeds.generator(setup.config.seed, "sent", client.id))
        rows = order[: self.samples].sort().values  # the same ones in every round
        known = torch.zeros(len(client.data), setup.classes)  # no teacher: adds no loss
        if "outputs" in message:
            known[rows] = probabilities(message["outputs"], self.temperature)
        targets = torch.cat([_one_hot(client.data.labels, setup.classes), known], 1)
        weights = setup.trainer.train(client, setup.local_weights(client), objective=self.objective, targets=targets)
        sent = client.data.select(rows)
        tensors = {
            "maps": setup.trainer.extract(client.model, weights, sent.pixels),
            "outputs": setup.trainer.predict(client.model, weights, sent.pixels),
            "labels": sent.labels,
        }
        return Update(tensors, len(client.data)), put("model", weights)

    @mean_over_samples
    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss for targets [B, 2 C]: labels, one-hot, and the other side's probs at T, or zeros."""
        labels, probs = targets.chunk(2, -1)
        return cross_entropy(logits, labels) + self.weight * Softened(kl, self.temperature)(logits, probs)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        most, (_, shape) = -self.samples, _extractor(setup, setup.student)
        return {"maps": (most, *shape), "outputs": (most, setup.classes), "labels": Int64((most,))}

    def check_update(self, setup: Setup, update: Update) -> str:
        labels, counts = update.tensors["labels"], {len(tensor) for tensor in update.tensors.values()}
        if counts != {min(update.examples, self.samples)}:
            return "sent other numbers of feature maps, outputs and labels than it has samples"
        return "" if ((labels >= 0) & (labels < setup.classes)).all() else "sent labels that do not exist"

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        maps, outputs, labels = (
            torch.cat([update.tensors[name] for update in updates.values()]) for name in ("maps", "outputs", "labels")
        )
        targets = torch.cat([_one_hot(labels, setup.classes), probabilities(outputs, self.temperature)], 1)
        known, student = SoftLabels(maps, targets), take("student", state)
        weights = setup.distill(setup.student, student, known, self.objective, seed=seed, are_maps=True)
        logits = setup.trainer.predict(setup.student, weights, maps, are_maps=True)
        own = torch.split(logits, [len(update.tensors["labels"]) for update in updates.values()])
        new = {str(client): each.clone() for client, each in zip(updates, own, strict=True)}
        return {**state, **put("student", weights), **put("outputs", new)}

    def evaluation_message(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)

    def evaluated_model(self, setup: Setup, client: int, memory: Tensors, message: Tensors) -> tuple[str, Tensors]:
        names, _ = _extractor(setup, setup.student)
        return setup.student, {**message, **{name: memory[f"model/{name}"] for name in names}}


def _extractor(setup: Setup, model: str) -> tuple[Shapes, tuple[int, ...]]:
    """The shapes of the weights of a model's first layers, and of a feature map."""
    try:
        return setup.trainer.extractor(model, setup.proxy.images)
    except ValueError as error:
        raise UsageError(f"fedgkt cannot use --model {model}: {error}.") from error


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    one_hot: Tensor = torch.nn.functional.one_hot(labels, classes)
    return one_hot.float()
