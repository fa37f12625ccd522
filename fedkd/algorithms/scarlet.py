"""SCARLET (Azuma et al., 2025): soft labels are cached on both sides, and asked for again when they are old."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.ensemble import OwnTeacher, heard
from fedkd.core.lazy import torch
from fedkd.core.tensors import integer, put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Scarlet(OwnTeacher):
    """A label serves for ``duration`` rounds after the one it was made in; the teacher is beta-ERA.

    Which images are asked for follows from the seed, so that no signal needs to be sent: `stamps` says it to
    both sides. A client that was away is sent all labels that changed since. The paper's duration is 50, for
    2,000 rounds that use a tenth of the proxy each (``--proxy-samples``).
    """

    beta: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 2.0
    duration: PositiveInt = 2

    def __post_init__(self) -> None:
        if self.down != "labels":
            raise ValueError("what comes down are labels")

    def init(self, kit: Kit) -> Tensors:
        seen = torch.zeros(kit.config.clients, dtype=torch.int64)  # the last round of which a client's answer counted
        return {**super().init(kit), "seen": seen, "cache": torch.zeros(len(kit.proxy), kit.classes)}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        since, made = state["seen"][client].clone(), stamps(kit, self.duration, int(state["round"]) - 1)
        return {"round": state["round"], "since": since, "probs": state["cache"][_newer(made, since)]}

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        number = int(request["round"])
        made = stamps(kit, self.duration, number - 1)
        memory = dict(client.memory)
        cache = memory.get("cache", torch.zeros(len(kit.proxy), kit.classes)).clone()
        held = memory.get("held", torch.zeros(len(kit.proxy), dtype=torch.int64)).clone()
        fresh = _newer(made, request["since"])
        cache[fresh], held[fresh] = request["probs"], made[fresh]
        weights = kit.own(client)
        rows = kit.subset(number - 1) if number > 1 else torch.zeros(0, dtype=torch.int64)
        rows = rows[held[rows] > 0]  # all of them, unless this client has lost its memory
        if len(rows):
            weights = self.plain(kit).digest(client, weights, rows, cache[rows], self.digest_epochs)
        weights = kit.fit(client, weights)
        probs = aggregators.probabilities(kit.predict(client.model, weights, kit.proxy[self.wanted(kit, number)]))
        return Update({"probs": probs}, len(client.data)), {"cache": cache, "held": held, **put("model", weights)}

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {"probs": (len(self.wanted(kit, int(state["round"]))), kit.classes)}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        number, cache, seen = int(state["round"]), state["cache"].clone(), state["seen"].clone()
        if len(asked := self.wanted(kit, number)):
            answers = heard([update.tensors for update in updates.values()])
            cache[asked] = self.teacher(kit, answers, self.weigh(kit, updates))
        seen[list(updates)] = integer(number)
        rows = kit.subset(number)
        return {**self.learn(self.plain(kit), state, rows, cache[rows], seed), "cache": cache, "seen": seen}

    def aggregate(self, logits: Tensor, weights: Tensor) -> Tensor:
        return aggregators.beta_era(logits, weights, beta=self.beta)

    def wanted(self, kit: Kit, number: int) -> Tensor:
        """The proxy rows whose labels are asked for in a round: those of the round that are missing or too old."""
        rows = kit.subset(number)
        return rows[_is_old(stamps(kit, self.duration, number - 1)[rows], number, self.duration)]


def stamps(kit: Kit, duration: int, number: int) -> Tensor:
    """The round [P] in which the label of each proxy image was made, after ``number`` rounds; 0 for none."""
    latest = _latest(kit.config.seed, len(kit.proxy), kit.config.proxy_samples, duration)
    if number < latest.round:
        latest.round, latest.made = 0, torch.zeros(len(kit.proxy), dtype=torch.int64)
    for round_ in range(latest.round + 1, number + 1):
        made, rows = latest.made.clone(), kit.subset(round_)
        made[rows] = torch.where(_is_old(made[rows], round_, duration), round_, made[rows])
        latest.round, latest.made = round_, made
    return latest.made


@dataclass
class _Latest:
    """The last round that was asked for, and its stamps."""

    round: int
    made: Tensor


@lru_cache(maxsize=4)
def _latest(seed: int, images: int, samples: int, duration: int) -> _Latest:
    """Kept, so that each round is worked out once."""
    return _Latest(0, torch.zeros(images, dtype=torch.int64))


def _is_old(made: Tensor, number: int, duration: int) -> Tensor:
    return (made == 0) | (number - made > duration)


def _newer(made: Tensor, since: Tensor) -> Tensor:
    """Which labels a client has not been sent, whose answer counted last in round ``since`` (0: never)."""
    return made >= since.clamp_min(1)
