"""Selective-FD (Shao et al., 2024): clients answer what they know, the server keeps what is not ambiguous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from fedkd.algorithms.aggregators import probabilities
from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.density import density_of
from fedkd.algorithms.ensemble import OwnTeacher, heard
from fedkd.core.lazy import torch
from fedkd.core.tensors import UInt8, put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class SelectiveFD(OwnTeacher):
    """A client answers images whose density ratio (KuLSIF) exceeds ``client_threshold``.

    The server keeps those whose mean answer p is nearer than ``server_threshold`` to its one-hot, in L1: that
    distance is 2 (1 - max p). Which images were answered or kept goes as one bit each. The thresholds are ours.
    """

    client_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    server_threshold: Annotated[float, Field(gt=0, le=2)] = 1.5

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights, rows = self.train(kit, client, request), kit.subset(int(request["round"]))
        is_known = density_of(kit, client, rows) > self.client_threshold
        probs = probabilities(kit.predict(client.model, weights, kit.proxy[rows[is_known]]))
        coverage = {"coverage": is_known.double().mean().item()}
        return Update({"answered": bits(is_known), "probs": probs}, len(client.data), coverage), put("model", weights)

    def digest(self, kit: Kit, client: Client, weights: Tensors, request: Tensors) -> Tensors:
        if not len(request.get("probs", ())):
            return weights
        rows = kit.subset(int(request["told"]))
        kept = rows[flags(request["kept"], len(rows))]
        return kit.digest(client, weights, kept, request["probs"], self.digest_epochs)

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        asked = super().ask(kit, state, client)
        return {**asked, "kept": state["kept"]} if "probs" in asked else asked

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        count, classes = kit.answers()
        return {"answered": UInt8((-(-count // 8),)), "probs": (-count, classes)}

    def objection(self, kit: Kit, update: Update) -> str:
        answered = flags(update.tensors["answered"], kit.answers()[0])
        return "" if answered.sum() == len(update.tensors["probs"]) else "sent other answers than it says"

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        rows = kit.subset(int(state["round"]))
        answered = torch.stack([flags(u.tensors["answered"], len(rows)) for u in updates.values()])
        logits = torch.zeros(len(updates), len(rows), kit.classes)
        for place, answer in enumerate(heard([update.tensors for update in updates.values()])):
            logits[place, answered[place]] = answer
        probs = self.teacher(kit, list(logits), self.weigh(kit, updates) * answered)
        kept = answered.any(0) & (2 * (1 - probs.max(-1).values) < self.server_threshold)
        new = self.learn(self.plain(kit), state, rows[kept], probs[kept], seed)
        return {**new, "kept": bits(kept), "probs": probs[kept]}


def bits(chosen: Tensor) -> Tensor:
    """Flags [N] as uint8 [ceil(N / 8)]."""
    return torch.from_numpy(np.packbits(chosen.numpy()))


def flags(packed: Tensor, count: int) -> Tensor:
    """The ``count`` flags that `bits` packed."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))
