"""FedMD (Li and Wang, 2019): class scores up, their mean down, no model on the server.

The paper's first phase, training on the public set's own labels, is left out: the proxy is taken
as unlabeled here (docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from fedkd.algorithms import aggregators, privacy
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core import seeds
from fedkd.core.lazy import torch
from fedkd.core.tensors import integer, put, weighted_mean
from fedkd.training.losses.logits import logit_mae

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedMD(Algorithm):
    """A client digests the mean scores (mean absolute error), revisits its data, and answers."""

    digest_epochs: PositiveInt = 1

    def init(self, kit: Kit) -> Tensors:
        return {"round": integer(1)}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights = kit.own(client)
        if "logits" in request:
            rows = kit.subset(int(request["told"]))
            weights = kit.digest(client, weights, rows, request["logits"], self.digest_epochs, logit_mae)
        weights = kit.fit(client, weights)
        logits = kit.answer(client, weights, int(request["round"]))
        return Update({"logits": logits}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {"logits": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        consensus = weighted_mean([update.tensors for update in updates.values()], [1.0] * len(updates))
        return {"round": state["round"] + 1, "told": state["round"], "logits": consensus["logits"]}

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return aggregators.mean_logits(torch.stack(list(logits)), torch.ones(len(logits), 1))


@dataclass(frozen=True)
class NFDP(FedMD):
    """FedMD-NFDP (Sun and Lyu, 2021): FedMD whose clients train on ``samples`` of their rows, drawn once.

    Its metrics are the (epsilon, delta) of that draw (`privacy`); a round shows their means, the guarantee
    is the largest. Delta is about samples / rows: none by the usual rule that it be far below 1 / rows.
    """

    samples: PositiveInt = 100
    replacement: bool = False

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        rows = len(client.data)
        count = self.samples if self.replacement else min(self.samples, rows)
        rng = seeds.rng(kit.config.seed, "nfdp", client.id)
        drawn = torch.from_numpy(rng.choice(rows, size=count, replace=self.replacement))
        data = replace(client.data, pixels=client.data.pixels[drawn], labels=client.data.labels[drawn])
        update, memory = super().local(kit, replace(client, data=data), request)
        epsilon, delta = privacy.noise_free(rows, count, self.replacement)
        return replace(update, metrics={**update.metrics, "epsilon": epsilon, "delta": delta}), memory
