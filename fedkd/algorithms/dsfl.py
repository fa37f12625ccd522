"""DS-FL (Itahara et al., 2020): probabilities up, sharpened probabilities down, everyone distills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from fedkd import ensembles
from fedkd.algorithm import Client, Update
from fedkd.algorithms.ensemble import Ensemble
from fedkd.losses.logits import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.kit import Kit
    from fedkd.tensors import Tensors


@dataclass(frozen=True)
class DSFL(Ensemble):
    """The protocol of `Ensemble` with DS-FL's own answer, teacher and loss.

    ``aggregation="era"`` is softmax(mean probs / temperature); ``"sa"`` the plain mean. The loss is
    the soft cross-entropy, whatever ``--aggregator``, ``--loss`` and ``--temperature`` say.
    """

    feedback: bool = True
    aggregation: Literal["era", "sa"] = "era"
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.1

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        update, memory = super().local(_plain(kit), client, request)
        probs = update.tensors["logits"].double().softmax(-1).float()
        return replace(update, tensors={"probs": probs}), memory

    def sends(self, kit: Kit) -> Mapping[str, tuple[int, ...]]:
        return {"probs": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        # log p is a logit of p, since softmax(log p) = p: one set of aggregators serves both.
        logits = {
            client: replace(update, tensors={"logits": update.tensors["probs"].clamp_min(1e-30).log()})
            for client, update in updates.items()
        }
        return super().tell(_plain(kit), state, logits, seed)

    def teacher(self, kit: Kit, logits: Sequence[Tensor]) -> Tensor:
        if self.aggregation == "era":
            return replace(_plain(kit), aggregator=partial(ensembles.era, temperature=self.temperature)).ensemble(
                logits
            )
        return replace(_plain(kit), aggregator=ensembles.mean_probs).ensemble(logits)


def _plain(kit: Kit) -> Kit:
    """The kit with the paper's loss, and no temperature but the teacher's own."""
    return replace(kit, loss=cross_entropy, config=replace(kit.config, temperature=1.0))
