"""FedNTD (Lee et al., 2022), FedLMD (Lu et al., 2023): FedAvg whose clients distill from the global model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core.lazy import torch
from fedkd.core.tensors import put
from fedkd.training.losses.logits import kl
from fedkd.training.objectives import Bound, Softened, mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors

HIDDEN = -1e30  # the logit of a class that is left out; finite, so that its product with a probability of zero is zero


@dataclass(frozen=True)
class FedNTD(FedAvg):
    """FedNTD (Lee et al., 2022): FedAvg whose clients distill the classes that are not true from the global model.

    A client minimizes CE + beta * temperature^2 * KL(global || local), where both softmaxes are at the temperature and
    leave out the label of the sample.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}
    beta: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 1.0

    def masked(self, counts: Tensor) -> Tensor:
        """The classes [C] that the teacher leaves out on a client with so many samples of each class."""
        return torch.zeros_like(counts, dtype=torch.bool)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        counts = torch.bincount(client.data.labels, minlength=setup.classes)
        objective = Bound(self.objective, {"masked": self.masked(counts)})
        weights = setup.trainer.train(client, message, objective=objective, teachers=[message])
        return Update(weights, len(client.data)), put("model", weights)

    @mean_over_samples
    def objective(self, outputs: tuple[Tensor, list[Tensor]], labels: Tensor, tensors: Tensors) -> Tensor:
        """The loss of a client, from the logits of its model and of the global model."""
        logits, (teacher,) = outputs
        is_true = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        is_hidden = is_true | tensors["masked"]
        probs = (teacher.masked_fill(is_hidden, HIDDEN) / self.temperature).softmax(-1) * ~is_hidden
        distance = Softened(kl, self.temperature)(logits.masked_fill(is_true, HIDDEN), probs)
        return torch.nn.functional.cross_entropy(logits, labels) + self.beta * distance


@dataclass(frozen=True)
class FedLMD(FedNTD):
    """FedLMD (Lu et al., 2023): FedNTD whose teacher also leaves out the client's majority classes.

    These have more samples than the mean class of the client. The student leaves out only the label of the sample.
    A sample for which no class is left has no distillation loss.
    """

    def masked(self, counts: Tensor) -> Tensor:
        return counts > counts.double().mean()
