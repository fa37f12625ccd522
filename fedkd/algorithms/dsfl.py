"""DS-FL (Itahara et al., 2020): probabilities up, sharpened probabilities down, everyone distills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from fedkd.algorithms import aggregators
from fedkd.algorithms.ensemble import OwnTeacher

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DSFL(OwnTeacher):
    """``aggregation="era"`` is softmax(mean probs / temperature); ``"sa"`` the plain mean."""

    aggregation: Literal["era", "sa"] = "era"
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.1

    def aggregate(self, logits: Tensor, weights: Tensor) -> Tensor:
        if self.aggregation == "sa":
            return super().aggregate(logits, weights)
        return aggregators.era(logits, weights, temperature=self.temperature)
