"""FedMD (Li and Wang, 2019): logits on the uplink, their mean on the downlink, no model on the server.

The paper's first phase, training on the public set's own labels, is left out: the proxy set is unlabeled here
(docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import SERVER_DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.algorithms.ensemble import distill_locally
from fedkd.core import seeds
from fedkd.core.lazy import torch
from fedkd.core.tensors import integer, put, weighted_mean
from fedkd.training.losses.logits import logit_mae

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FedMD(Algorithm):
    """FedMD (Li and Wang, 2019): clients distill from the mean of all clients' logits; no model on the server.

    A client distills from the mean logits (mean absolute error), trains on its samples, and uploads its logits.
    """

    ignores: ClassVar[frozenset[str]] = (
        SERVER_DISTILLATION | STUDENT | {"aggregator", "weighting", "temperature", "loss"}
    )
    local_distill_epochs: PositiveInt = 1

    def initial_state(self, setup: Setup) -> Tensors:
        return {"round": integer(1)}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.local_weights(client)
        if "logits" in message:
            indices = setup.proxy.subset(int(message["prev"]))
            weights = distill_locally(
                setup, client, weights, indices, message["logits"], logit_mae, self.local_distill_epochs
            )
        weights = setup.trainer.train(client, weights)
        logits = setup.proxy_logits(client.model, weights, int(message["round"]))
        return Update({"logits": logits}, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {"logits": setup.logits_shape}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        consensus = weighted_mean([update.tensors for update in updates.values()], [1.0] * len(updates))
        return {"round": state["round"] + 1, "prev": state["round"], "logits": consensus["logits"]}

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return aggregators.mean_logits(torch.stack(list(logits)), torch.ones(len(logits), 1))


@dataclass(frozen=True)
class NFDP(FedMD):
    """FedMD-NFDP (Sun and Lyu, 2021): FedMD whose clients train on ``samples`` of their samples, drawn once.

    Its metrics are the (epsilon, delta) of that draw (`sampling_privacy`). A round reports their means over clients;
    the guarantee is the largest. Delta is about samples / all samples, far above the usual rule delta << 1 / samples.
    """

    metrics: ClassVar[tuple[str, ...]] = ("epsilon", "delta")
    samples: PositiveInt = 100
    replacement: bool = False

    def initial_state(self, setup: Setup) -> Tensors:
        for model in setup.models:
            setup.trainer.check_batch_norm(model, self.samples, "nfdp:samples")
        return super().initial_state(setup)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        total = len(client.data)
        count = self.samples if self.replacement else min(self.samples, total)
        rng = seeds.rng(setup.config.seed, "nfdp", client.id)
        drawn = torch.from_numpy(rng.choice(total, size=count, replace=self.replacement))
        data = replace(client.data, pixels=client.data.pixels[drawn], labels=client.data.labels[drawn])
        update, memory = super().local_update(setup, replace(client, data=data), message)
        epsilon, delta = sampling_privacy(total, count, self.replacement)
        return replace(update, metrics={"epsilon": epsilon, "delta": delta}), memory


def sampling_privacy(total: int, count: int, replacement: bool) -> tuple[float, float]:
    """The (epsilon, delta) of training on ``count`` of ``total`` samples (Sun and Lyu, 2021, theorems 2 and 3)."""
    if replacement:
        return count * log((total + 1) / total), 1 - ((total - 1) / total) ** count
    return log((total + 1) / (total + 1 - count)), count / total
