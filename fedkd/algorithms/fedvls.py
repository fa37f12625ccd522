"""FedVLS (Guo et al., 2025): FedAvg whose clients keep the global model's knowledge of the classes that they lack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms.base import DISTILLATION, Client, Update
from fedkd.algorithms.fedavg import FedAvg
from fedkd.algorithms.fedntd import HIDDEN
from fedkd.core.lazy import torch
from fedkd.core.tensors import put
from fedkd.training.losses.logits import kl
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class FedVLS(FedAvg):
    """FedVLS (Guo et al., 2025): vacant-class distillation from the global model, and logit suppression.

    A client with a share p_c of its samples in class c minimizes the cross-entropy of logits + log p, plus
    weight * KL(global || local), both softmaxes over the classes that it lacks, plus suppression times the sum over c
    of p_c * log(mean over the batch of exp(logit_c - log p_c - log C)), where a sample of class c counts as exp(0).
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.1
    suppression: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.005

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        counts = torch.bincount(client.data.labels, minlength=setup.classes)
        objective = Bound(self.objective, {"shares": counts / counts.sum()})
        weights = setup.trainer.train(client, message, objective=objective, teachers=[message])
        return Update(weights, len(client.data)), put("model", weights)

    def objective(self, outputs: tuple[Tensor, list[Tensor]], labels: Tensor, tensors: Tensors) -> Tensor:
        """The loss of a client, from the logits of its model and of the global model; ``shares`` [C] are p."""
        (logits, (teacher,)), shares = outputs, tensors["shares"]
        log_shares, has = (shares + 1e-9).log(), shares > 0  # the authors' bound
        probs = teacher.masked_fill(has, HIDDEN).softmax(-1) * ~has
        vacant = kl(logits.masked_fill(has, HIDDEN), probs)
        is_true = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        spread = (logits - log_shares - math.log(logits.shape[-1])).masked_fill(is_true, 0.0)
        suppressed = (shares * (spread.logsumexp(0) - math.log(len(labels)))).sum()
        fit = torch.nn.functional.cross_entropy(logits + log_shares, labels)
        return fit + self.weight * vacant + self.suppression * suppressed
