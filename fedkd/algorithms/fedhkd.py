"""FedHKD (Chen et al., 2023): FedAvg with the mean embedding and the mean prediction of each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fd import class_means
from fedkd.algorithms.fedproto import FedProto, head_logits, head_of, merged
from fedkd.core.lazy import torch
from fedkd.core.tensors import Int64, put, take, weighted_mean
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FedHKD(FedProto):
    """FedHKD (Chen et al., 2023): FedAvg and FedProto at once, with the mean prediction of each class.

    A client minimizes CE + weight * mean((embedding - H_y)^2), with the mean embedding H_y of its class, plus
    prediction_weight / C * the mean over classes c of KL(Q_c || softmax(head(H_c) / temperature)), with the mean
    prediction Q_c. Both means are over the samples of all clients, and of the last round. The head is the last linear
    layer. The number of samples of each class is uploaded as well.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.05
    prediction_weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.05
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.5

    @property
    def needs_one_model(self) -> bool:
        return True

    def initial_state(self, setup: Setup) -> Tensors:
        head_of(setup, "fedhkd")
        predictions = torch.zeros(setup.classes, setup.classes)
        student = put("student", setup.trainer.initial_weights(setup.student))
        return {**student, **super().initial_state(setup), "predictions": predictions}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        head, known = head_of(setup, "fedhkd"), {name: message[name] for name in ("prototypes", "predictions")}
        known["is_known"] = message["counts"] > 0
        # The module that is trained with its embeddings has the client's model as a part of this name.
        distance = PredictionLoss(f"model.{head}", self.prediction_weight, self.temperature)
        weights = setup.trainer.train(
            client,
            take("student", message),
            objective=Bound(self.objective, known),
            penalty=Bound(distance, known),
            with_embeddings=True,
        )
        embeddings = setup.trainer.embed(client.model, weights, client.data.pixels)
        probs = (head_logits(weights, head, embeddings) / self.temperature).softmax(-1)
        prototypes, counts = class_means(embeddings, client.data.labels, setup.classes)
        predictions, _ = class_means(probs, client.data.labels, setup.classes)
        knowledge = {"prototypes": prototypes, "predictions": predictions, "counts": counts}
        return Update({**put("student", weights), **knowledge}, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        weights, square = setup.trainer.weight_shapes(setup.student), (setup.classes, setup.classes)
        return {
            **{f"student/{name}": shape for name, shape in weights.items()},
            "prototypes": weights[f"{head_of(setup, 'fedhkd')}.weight"],
            "predictions": square,
            "counts": Int64((setup.classes,)),
        }

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        examples = [update.examples for update in updates.values()]
        students = [take("student", update.tensors) for update in updates.values()]
        return {
            **put("student", weighted_mean(students, examples)),
            **super().aggregate(setup, state, updates, seed),
            "predictions": merged("predictions", state, updates),
        }

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)


@dataclass(frozen=True)
class PredictionLoss:
    """Weight / C * the mean of KL(Q_c || softmax(head(H_c) / temperature)) over the classes c that are known."""

    head: str
    weight: float
    temperature: float

    def __call__(self, parameters: Tensors, tensors: Tensors) -> Tensor:
        """The term, from the named parameters of the model; ``prototypes`` [C, D] are H, ``predictions`` [C, C] Q."""
        targets, is_known = tensors["predictions"], tensors["is_known"]
        log_probs = (head_logits(parameters, self.head, tensors["prototypes"]) / self.temperature).log_softmax(-1)
        distances = (targets * (targets.clamp_min(1e-30).log() - log_probs)).mean(-1) * is_known
        return self.weight * distances.sum() / is_known.sum().clamp_min(1)
