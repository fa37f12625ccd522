"""MOON (Li et al., 2021): FedAvg whose clients keep their embeddings near those of the global model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core.errors import UsageError
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, take
from fedkd.training.objectives import mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors

    Embedded = tuple[Tensor, Tensor]  # logits [B, C] and embeddings [B, D]


@dataclass(frozen=True)
class Moon(FedAvg):
    """MOON (Li et al., 2021): FedAvg with a contrastive term between models in the local loss.

    A client minimizes CE + mu * -log(e^(s_g / t) / (e^(s_g / t) + e^(s_p / t))). s_g and s_p are the cosine
    similarities of its embedding with those by the global model and by its own model of its last round.

    Embeddings are the input of the last linear layer. In a client's first round, its last model is the global one,
    and the term has no gradient.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}
    mu: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 5.0
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.5

    def initial_state(self, setup: Setup) -> Tensors:
        state = super().initial_state(setup)
        try:
            setup.trainer.embed(setup.student, state, setup.proxy.images[:1])
        except ValueError as error:
            raise UsageError(f"moon cannot use --model {setup.student}: {error}.") from error
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        teachers = [message, take("model", client.memory) or message]
        weights = setup.trainer.train(
            client, message, objective=self.objective, with_embeddings=True, teachers=teachers
        )
        return Update(weights, len(client.data)), put("model", weights)

    @mean_over_samples
    def objective(self, outputs: tuple[Embedded, list[Embedded]], labels: Tensor) -> Tensor:
        """The loss of a client, from the outputs of its model and of the global and its last one."""
        (logits, embedding), others = outputs
        near = [torch.nn.functional.cosine_similarity(embedding, other, dim=-1) for _, other in others]
        contrast = -(torch.stack(near, -1) / self.temperature).log_softmax(-1)[..., 0].mean()
        return torch.nn.functional.cross_entropy(logits, labels) + self.mu * contrast
