"""FedEMA-Distill (2026, arXiv 2603.04422): logits up, the weights of a slowly moving student down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedkd.algorithms.ensemble import Downlink, Ensemble
from fedkd.core.tensors import put, take, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class FedEMA(Ensemble):
    """FedEMA-Distill (2026): the student is a moving average, decay * before + (1 - decay) * distilled.

    ``--aggregator`` may be a robust one. The default of ``decay`` is ours; the paper was not available to us.
    """

    downlink: Downlink = "student"
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def distill_student(
        self, setup: Setup, state: Tensors, indices: Tensor, probs: Tensor, seed: int
    ) -> dict[str, Tensor]:
        new = super().distill_student(setup, state, indices, probs, seed)
        before_and_after = [take("student", state), take("student", new)]
        return {**new, **put("student", weighted_mean(before_and_after, [self.decay, 1 - self.decay]))}
