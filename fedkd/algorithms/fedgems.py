"""FedGEMS (Cheng et al., 2021): a larger server learns from those clients that are right about a labeled proxy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedkd.algorithms.aggregators import probabilities
from fedkd.algorithms.ensemble import OwnTeacher, heard
from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Update
    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedGEMS(OwnTeacher):
    """Everyone who distills minimizes hard * CE(labels) + (1 - hard) * CE(teacher).

    Both are cross-entropies of one student, so they are one with mixed targets. It reads the proxy's labels.
    """

    labeled_proxy: ClassVar[bool] = True
    said: ClassVar[str] = "logits"
    hard: Annotated[float, Field(ge=0, le=1)] = 0.75

    def digest(self, kit: Kit, client: Client, weights: Tensors, request: Tensors) -> Tensors:
        if "probs" in request:
            mixed = self.mix(_truth(kit, int(request["told"])), request["probs"])
            request = {**request, "probs": mixed}
        return super().digest(kit, client, weights, request)

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        kit, number = self.plain(kit), int(state["round"])
        rows, truth = kit.subset(number), _truth(kit, number)
        own = kit.predict(kit.student, self.deploy(kit, state), kit.proxy[rows])
        own = own if number > 1 else -truth  # an untrained server is right by chance, and counts as wrong
        teacher = selected(own, torch.stack(heard([update.tensors for update in updates.values()])), truth)
        new = self.learn(kit, state, rows, self.mix(truth, teacher), seed)
        answer = kit.predict(kit.student, self.deploy(kit, new), kit.proxy[rows])
        return {**new, "probs": probabilities(answer)}

    def mix(self, truth: Tensor, probs: Tensor) -> Tensor:
        """The targets [N, C]."""
        return self.hard * truth + (1 - self.hard) * probs


def selected(own: Tensor, logits: Tensor, truth: Tensor) -> Tensor:
    """The teacher [N, C] of an image: the server itself if it is right, else the clients that are, else the label.

    ``own`` [N, C] and ``logits`` [K, N, C]; ``truth`` [N, C] one-hot. Clients weigh softmax(1 / entropy).
    """
    labels = truth.argmax(-1)
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    is_right = logits.argmax(-1) == labels
    weights = (1 / entropy.clamp_min(1e-3)).masked_fill(~is_right, -torch.inf).softmax(0).nan_to_num(0.0)
    teacher = (weights[..., None] * log_probs.exp()).sum(0)
    teacher = torch.where(is_right.any(0)[:, None], teacher, truth.double())
    return torch.where((own.argmax(-1) == labels)[:, None], own.double().softmax(-1), teacher).to(truth.dtype)


def _truth(kit: Kit, number: int) -> Tensor:
    """The labels [N, C] of a round's proxy images, one-hot."""
    assert kit.proxy_labels is not None
    return torch.nn.functional.one_hot(kit.proxy_labels[kit.subset(number)], kit.classes).float()
