"""FedEMA-Distill (2026, arXiv 2603.04422): logits up, a student that moves slowly, its weights down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedkd.algorithms.ensemble import Down, Ensemble
from fedkd.core.tensors import put, take, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedEMA(Ensemble):
    """The student is an exponential moving average: decay * before + (1 - decay) * distilled.

    ``--aggregator`` may be a robust one. The decay is ours; the paper's was not read.
    """

    down: Down = "student"
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def learn(self, kit: Kit, state: Tensors, rows: Tensor, probs: Tensor, seed: int) -> dict[str, Tensor]:
        new = super().learn(kit, state, rows, probs, seed)
        both = [take("student", state), take("student", new)]
        return {**new, **put("student", weighted_mean(both, [self.decay, 1 - self.decay]))}
