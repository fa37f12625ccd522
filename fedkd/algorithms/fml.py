"""FML (Shen et al., 2020), FedKD (Wu et al., 2022): each client's mentor and the averaged student teach each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core import specs
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, take
from fedkd.training import models
from fedkd.training.losses.logits import kl
from fedkd.training.objectives import mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class FML(FedAvg):
    """FML (Shen et al., 2020): FedAvg of students, each trained together with a mentor that stays on its client.

    Both minimize CE + KL(other || own) on the same batches; the other's probabilities are constants.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}
    model: str = "resnet20"

    def __post_init__(self) -> None:
        specs.bind("model", self.model, models.RESERVED)

    @property
    def private_models(self) -> tuple[str, ...]:
        return (self.model,)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        mentor = take("mentor", client.memory) or setup.trainer.initial_weights(self.model)
        weights, mentor = setup.trainer.train_pair(client, message, (self.model, mentor), self.objective)
        return Update(weights, len(client.data)), {**put("model", weights), **put("mentor", mentor)}

    @mean_over_samples
    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The losses of both together; logits [B, 2, C] of student and mentor."""
        costs, distances = _mutual(logits, labels)
        return torch.stack([*costs, *distances]).sum()


@dataclass(frozen=True)
class FedKD(FML):
    """FedKD (Wu et al., 2022): FML whose distillation is weaker while predictions are poor.

    Both minimize CE + KL(other || own) / (CE of both), where what is not their own is constant. The paper's terms on
    hidden layers and its compression of updates by singular vectors are left out.
    """

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The losses of both together; logits [B, 2, C] of student and mentor."""
        costs, distances = _mutual(logits, labels)
        (ours, theirs), (to_theirs, to_ours) = costs, distances
        # Where both are certain and right, the costs round to zero, and so do the distances.
        scales = [(own + other.detach()).clamp_min(1e-12) for own, other in ((ours, theirs), (theirs, ours))]
        return ours + theirs + to_theirs / scales[0] + to_ours / scales[1]


def _mutual(logits: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The cross-entropies of student and mentor, and their distances KL(other || own)."""
    both = logits.unbind(-2)
    costs = [torch.nn.functional.cross_entropy(own, labels) for own in both]
    return costs, [kl(own, other.detach().softmax(-1)) for own, other in zip(both, both[::-1], strict=True)]
