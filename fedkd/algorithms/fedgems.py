"""FedGEMS (Cheng et al., 2021): a larger server learns from the clients that are right about a labeled proxy set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy, uploaded_logits
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import probabilities

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Distillation, Setup, Update
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class FedGEMS(Ensemble):
    """FedGEMS (Cheng et al., 2021): the teacher is made of those that are right about a labeled proxy set.

    Server and clients minimize hard * CE(labels) + (1 - hard) * CE(teacher). Both are cross-entropies of one
    student, so they are one cross-entropy with mixed targets. Reads the proxy's labels.
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "weighting", "temperature", "loss"})
    reads_proxy_labels: ClassVar[bool] = True
    downlink: Downlink = "labels"
    hard: Annotated[float, Field(ge=0, le=1)] = 0.75

    def distillation(self, setup: Setup) -> Distillation:
        return soft_cross_entropy(setup)

    def distill_client(self, setup: Setup, client: Client, weights: Tensors, message: Tensors) -> Tensors:
        if "probs" in message:
            targets = self.mixed_targets(one_hot_labels(setup, int(message["prev"])), message["probs"])
            message = {**message, "probs": targets}
        return super().distill_client(setup, client, weights, message)

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        number = int(state["round"])
        labels = one_hot_labels(setup, number)
        logits = setup.proxy_logits(setup.student, self.global_model(setup, state), number)
        if number == 1:  # an untrained server is right by chance only, so it counts as wrong
            logits = -labels
        client_logits = torch.stack(uploaded_logits([update.tensors for update in updates.values()]))
        targets = self.mixed_targets(labels, selective_teacher(logits, client_logits, labels))
        new = self.distill_student(setup, state, setup.proxy.subset(number), targets, seed)
        logits = setup.proxy_logits(setup.student, self.global_model(setup, new), number)
        return {**new, "probs": probabilities(logits)}

    def mixed_targets(self, labels: Tensor, probs: Tensor) -> Tensor:
        """The targets [N, C]."""
        return self.hard * labels + (1 - self.hard) * probs


def selective_teacher(server_logits: Tensor, client_logits: Tensor, labels: Tensor) -> Tensor:
    """The teacher [N, C] of a sample: the server if it is right, else the clients that are right, else the label.

    ``server_logits`` [N, C], ``client_logits`` [K, N, C], ``labels`` [N, C] one-hot. Clients have the weights
    softmax(1 / entropy).
    """
    classes = labels.argmax(-1)
    log_probs = client_logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    is_right = client_logits.argmax(-1) == classes
    weights = (1 / entropy.clamp_min(1e-3)).masked_fill(~is_right, -torch.inf).softmax(0).nan_to_num(0.0)
    teacher = (weights[..., None] * log_probs.exp()).sum(0)
    teacher = torch.where(is_right.any(0)[:, None], teacher, labels.double())
    server_is_right = (server_logits.argmax(-1) == classes)[:, None]
    return torch.where(server_is_right, server_logits.double().softmax(-1), teacher).to(labels.dtype)


def one_hot_labels(setup: Setup, number: int) -> Tensor:
    """The labels [N, C] of the proxy samples of a round."""
    assert setup.proxy.labels is not None
    one_hot: Tensor = torch.nn.functional.one_hot(setup.proxy.labels[setup.proxy.subset(number)], setup.classes)
    return one_hot.float()
