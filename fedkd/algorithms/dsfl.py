"""DS-FL (Itahara et al., 2020): probabilities on the uplink, sharpened probabilities on the downlink."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from fedkd.algorithms import aggregators
from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy

if TYPE_CHECKING:
    from fedkd.algorithms.base import Distillation, Setup


@dataclass(frozen=True)
class DSFL(Ensemble):
    """DS-FL (Itahara et al., 2020): probabilities up, their sharpened mean down, distillation on both sides.

    ``aggregation="era"`` is softmax(mean probs / temperature); ``"sa"`` is the plain mean.
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "temperature", "loss"})
    uplink: ClassVar[str] = "probs"
    downlink: Downlink = "labels"
    aggregation: Literal["era", "sa"] = "era"
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.1

    def distillation(self, setup: Setup) -> Distillation:
        if self.aggregation == "sa":
            return soft_cross_entropy(setup)
        return soft_cross_entropy(setup, partial(aggregators.era, temperature=self.temperature))
