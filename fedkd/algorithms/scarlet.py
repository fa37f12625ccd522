"""SCARLET (Azuma et al., 2025): soft labels are cached on both sides and requested again when they are old."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy, uploaded_logits
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import probabilities
from fedkd.core.tensors import integer, put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Distillation, Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class Scarlet(Ensemble):
    """SCARLET (Azuma et al., 2025): soft labels are cached on both sides; the teacher is beta-ERA.

    A soft label is used for ``duration`` rounds after the one that computed it.

    The requested samples follow from the seed, so that nothing needs to be sent for them: `label_rounds` gives them
    on both sides. A client that was absent is sent all labels that have changed since. The paper's duration is 50,
    for 2,000 rounds that use a tenth of the proxy set each (``--proxy-samples``).
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "temperature", "loss"})
    accepts_late: ClassVar[bool] = False
    uplink: ClassVar[str] = "probs"
    downlink: Downlink = "labels"
    beta: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 2.0
    duration: PositiveInt = 2

    def __post_init__(self) -> None:
        if self.downlink != "labels":
            raise ValueError("the downlink carries labels")

    def distillation(self, setup: Setup) -> Distillation:
        return soft_cross_entropy(setup, partial(aggregators.beta_era, beta=self.beta))

    def initial_state(self, setup: Setup) -> Tensors:
        # The last round in which the server accepted an update of each client.
        seen = torch.zeros(setup.config.clients, dtype=torch.int64)
        cache = torch.zeros(len(setup.proxy.images), setup.classes)
        return {**super().initial_state(setup), "seen": seen, "cache": cache}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        since, computed = state["seen"][client].clone(), label_rounds(setup, self.duration, int(state["round"]) - 1)
        return {"round": state["round"], "since": since, "probs": state["cache"][_changed(computed, since)]}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        number = int(message["round"])
        computed = label_rounds(setup, self.duration, number - 1)
        samples = len(setup.proxy.images)
        cache = client.memory.get("cache", torch.zeros(samples, setup.classes)).clone()
        cached = client.memory.get("cached", torch.zeros(samples, dtype=torch.int64)).clone()
        changed = _changed(computed, message["since"])
        cache[changed], cached[changed] = message["probs"], computed[changed]
        weights: Tensors = setup.local_weights(client)
        indices = setup.proxy.subset(number - 1) if number > 1 else torch.zeros(0, dtype=torch.int64)
        indices = indices[cached[indices] > 0]  # all of them, unless this client has lost its memory
        if len(indices):
            weights = self.distill_on(setup, client, weights, indices, cache[indices])
        weights = setup.trainer.train(client, weights)
        images = setup.proxy.select(self.requested(setup, number))
        probs = probabilities(setup.trainer.predict(client.model, weights, images))
        memory = {"cache": cache, "cached": cached, **put("model", weights)}
        return Update({"probs": probs}, len(client.data)), memory

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {"probs": (len(self.requested(setup, number)), setup.classes)}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        number, cache, seen = int(state["round"]), state["cache"].clone(), state["seen"].clone()
        if len(requested := self.requested(setup, number)):
            logits = uploaded_logits([update.tensors for update in updates.values()])
            cache[requested] = self.teacher_probs(setup, logits, self.client_weights(setup, updates))
        seen[list(updates)] = integer(number)
        indices = setup.proxy.subset(number)
        return {**self.distill_student(setup, state, indices, cache[indices], seed), "cache": cache, "seen": seen}

    def requested(self, setup: Setup, number: int) -> Tensor:
        """The proxy samples whose labels are requested in a round: those without a label or with one too old."""
        indices = setup.proxy.subset(number)
        computed = label_rounds(setup, self.duration, number - 1)[indices]
        return indices[_is_old(computed, number, self.duration)]


def label_rounds(setup: Setup, duration: int, number: int) -> Tensor:
    """The round [P] that computed the label of each proxy sample, as of the end of round ``number``; 0: none."""
    latest = _latest(setup.config.seed, len(setup.proxy.images), setup.config.proxy_samples, duration)
    if number < latest.round:
        latest.round, latest.computed = 0, torch.zeros(len(setup.proxy.images), dtype=torch.int64)
    for round_ in range(latest.round + 1, number + 1):
        computed, indices = latest.computed.clone(), setup.proxy.subset(round_)
        computed[indices] = torch.where(_is_old(computed[indices], round_, duration), round_, computed[indices])
        latest.round, latest.computed = round_, computed
    return latest.computed


@dataclass
class _Latest:
    """The last round of `label_rounds` so far, and its result."""

    round: int
    computed: Tensor


@lru_cache(maxsize=4)
def _latest(seed: int, images: int, samples: int, duration: int) -> _Latest:
    """Cached, so that each round is computed once."""
    return _Latest(0, torch.zeros(images, dtype=torch.int64))


def _is_old(computed: Tensor, number: int, duration: int) -> Tensor:
    return (computed == 0) | (number - computed > duration)


def _changed(computed: Tensor, since: Tensor) -> Tensor:
    """Which labels a client has not been sent, if the server last accepted its update in round ``since`` (0: never)."""
    return computed >= since.clamp_min(1)
