"""Fed-ET (Cho et al., 2022): small clients and a larger student; weighted consensus and diversity regularization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms import aggregators
from fedkd.algorithms.weight_ensemble import ServerStep, WeightEnsemble
from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup, Update


@dataclass(frozen=True)
class FedET(WeightEnsemble):
    """Fed-ET (Cho et al., 2022): small clients and a larger student, with a consensus and diversity regularization.

    The student minimizes CE to the class of the consensus plus ``diversity`` * CE to the clients that disagree.

    In the consensus the weight of a client's logits is their variance over classes. Those that disagree are
    represented by their mean probabilities. The mean of each architecture is sent back as in FedAvg; the paper's copy
    of representation layers is left out.
    """

    diversity: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.05

    @property
    def server_step(self) -> ServerStep:
        return ServerStep(aggregators.variance, self.targets, separate_student=True)

    def targets(self, setup: Setup, updates: Mapping[int, Update], logits: Tensor, images: Tensor, seed: int) -> Tensor:
        """One-hot consensus + diversity * mean probabilities of the clients that disagree [R, C]."""
        weights = setup.distillation.client_weights([update.examples for update in updates.values()])
        label = aggregators.variance(logits, weights).argmax(-1)
        disagrees = (logits.argmax(-1) != label).double()
        diverse = (disagrees[..., None] * logits.double().softmax(-1)).sum(0) / disagrees.sum(0).clamp_min(1)[:, None]
        one_hot = torch.nn.functional.one_hot(label, setup.classes)
        targets: Tensor = (one_hot + self.diversity * diverse).float()
        return targets
