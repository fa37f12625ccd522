"""Selective-FD (Shao et al., 2024): clients label only samples similar to their own; ambiguous ones are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedkd.algorithms.base import Client, Update
from fedkd.algorithms.density import client_density_ratio
from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy, uploaded_logits
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import probabilities
from fedkd.core.tensors import UInt8, put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Distillation, Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class SelectiveFD(Ensemble):
    """Selective-FD (Shao et al., 2024): clients label samples that look like theirs; ambiguous labels are dropped.

    A client uploads probabilities of the samples whose density ratio (KuLSIF) exceeds ``client_threshold``.

    The server keeps the samples whose mean probs p are nearer than ``server_threshold`` to their one-hot in L1; that
    distance is 2 (1 - max p). One bit per sample tells which were labeled or kept. Both defaults are ours.
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "temperature", "loss"})
    metrics: ClassVar[tuple[str, ...]] = ("coverage",)
    uplink: ClassVar[str] = "probs"
    downlink: Downlink = "labels"
    client_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    server_threshold: Annotated[float, Field(gt=0, le=2)] = 1.5

    def distillation(self, setup: Setup) -> Distillation:
        return soft_cross_entropy(setup)

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights, indices = self.train_client(setup, client, message), setup.proxy.subset(int(message["round"]))
        is_known = client_density_ratio(setup, client, indices) > self.client_threshold
        probs = probabilities(setup.trainer.predict(client.model, weights, setup.proxy.select(indices[is_known])))
        coverage = {"coverage": is_known.double().mean().item()}
        tensors = {"selected": packed_bits(is_known), "probs": probs}
        return Update(tensors, len(client.data), coverage), put("model", weights)

    def distill_client(self, setup: Setup, client: Client, weights: Tensors, message: Tensors) -> Tensors:
        if not len(message.get("probs", ())):
            return weights
        indices = setup.proxy.subset(int(message["prev"]))
        kept = indices[unpacked_bits(message["kept"], len(indices))]
        return self.distill_on(setup, client, weights, kept, message["probs"])

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        message = super().broadcast(setup, state, client)
        return {**message, "kept": state["kept"]} if "probs" in message else message

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        samples, classes = setup.logits_shape
        return {"selected": UInt8((-(-samples // 8),)), "probs": (-samples, classes)}

    def check_update(self, setup: Setup, update: Update) -> str:
        selected = unpacked_bits(update.tensors["selected"], setup.logits_shape[0])
        is_consistent = selected.sum() == len(update.tensors["probs"])
        return "" if is_consistent else "sent probs of other samples than it selected"

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        indices = setup.proxy.subset(int(state["round"]))
        selected = torch.stack([unpacked_bits(u.tensors["selected"], len(indices)) for u in updates.values()])
        logits = torch.zeros(len(updates), len(indices), setup.classes)
        for place, uploaded in enumerate(uploaded_logits([update.tensors for update in updates.values()])):
            logits[place, selected[place]] = uploaded
        probs = self.teacher_probs(setup, list(logits), self.client_weights(setup, updates) * selected)
        kept = selected.any(0) & (2 * (1 - probs.max(-1).values) < self.server_threshold)
        new = self.distill_student(setup, state, indices[kept], probs[kept], seed)
        return {**new, "kept": packed_bits(kept), "probs": probs[kept]}


def packed_bits(flags: Tensor) -> Tensor:
    """Flags [N] as uint8 [ceil(N / 8)]."""
    return torch.from_numpy(np.packbits(flags.numpy()))


def unpacked_bits(packed: Tensor, count: int) -> Tensor:
    """The ``count`` flags that `packed_bits` packed."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))
