"""FedGen (Zhu et al., 2021): FedAvg with a generator of embeddings that the server trains on the clients' heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.algorithms.fedproto import check_counts, common_width, head_logits, head_of
from fedkd.core import seeds
from fedkd.core.lazy import torch
from fedkd.core.tensors import Int64, put, take, weighted_mean
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors

GENERATED = 512  # embeddings that a client draws in a round


@dataclass(frozen=True)
class FedGen(FedAvg):
    """FedGen (Zhu et al., 2021): FedAvg with a generator of embeddings G(label, noise), trained on the server.

    The server minimizes the sum over clients of share * CE(head(G(y, noise)), y), where the share is that of the
    client's samples in those of class y, plus a term for diversity. A client minimizes CE + weight * the mean of
    CE(head(G(y, noise)), y). Heads are last linear layers. The number of samples of each class is uploaded as well.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION - {"distill_batch_size", "distill_learning_rate"}
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0
    server_steps: PositiveInt = 50

    def initial_state(self, setup: Setup) -> Tensors:
        from fedkd.training import embedding_generator, loop

        head_of(setup, "fedgen")
        width, seed = common_width(setup, "fedgen"), seeds.derive(setup.config.seed, "generator")
        network = embedding_generator.Generator(setup.classes, width)
        loop.check_batch_norm(network, "fedgen's generator", setup.config.distill_batch_size, "--distill-batch-size")
        return {
            **put("student", setup.trainer.initial_weights(setup.student)),
            **put("generator", embedding_generator.initial_weights(setup.classes, width, seed)),
            "known": torch.zeros(setup.classes, dtype=torch.uint8),  # the classes that the generator has learned
        }

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state if state["known"].any() else put("student", take("student", state))

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        from fedkd.training import embedding_generator

        penalty = None
        if "known" in message and self.weight:
            embeddings, labels = embedding_generator.generated(
                take("generator", message), message["known"] > 0, GENERATED, client.derive("generated")
            )
            loss = HeadLoss(head_of(setup, "fedgen"), self.weight)
            penalty = Bound(loss, {"embeddings": embeddings, "labels": labels})
        weights = setup.trainer.train(client, take("student", message), penalty=penalty)
        counts = torch.bincount(client.data.labels, minlength=setup.classes)
        return Update({**put("student", weights), "counts": counts}, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        weights = setup.trainer.weight_shapes(setup.student)
        return {**{f"student/{name}": shape for name, shape in weights.items()}, "counts": Int64((setup.classes,))}

    def check_update(self, setup: Setup, update: Update) -> str:
        return check_counts(update)

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        from fedkd.training import embedding_generator

        students = [take("student", update.tensors) for update in updates.values()]
        counts, head = torch.stack([update.tensors["counts"] for update in updates.values()]), head_of(setup, "fedgen")
        none = torch.zeros(setup.classes)
        generator = embedding_generator.trained(
            take("generator", state),
            [(student[f"{head}.weight"], student.get(f"{head}.bias", none)) for student in students],
            counts,
            learning_rate=setup.config.distill_learning_rate,
            batch_size=setup.config.distill_batch_size,
            steps=self.server_steps,
            device=setup.trainer.device,
            seed=seed,
        )
        return {
            **put("student", weighted_mean(students, [update.examples for update in updates.values()])),
            **put("generator", generator),
            "known": state["known"] | (counts.sum(0) > 0).to(torch.uint8),
        }

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)


@dataclass(frozen=True)
class HeadLoss:
    """Weight * the mean cross-entropy of a model's last layer on ``embeddings`` [N, D] with ``labels`` [N]."""

    head: str
    weight: float

    def __call__(self, parameters: Tensors, tensors: Tensors) -> Tensor:
        """The term, from the named parameters of the model."""
        logits = head_logits(parameters, self.head, tensors["embeddings"])
        return self.weight * torch.nn.functional.cross_entropy(logits, tensors["labels"])
