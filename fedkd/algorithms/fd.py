"""FD (Jeong et al., 2018): no proxy at all; the mean output for each label up, that of the others down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.tensors import put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FD(Algorithm):
    """A client minimizes CE(label) + gamma * CE(mean output of the others for this label).

    A row of zeros stands for a label that a client (or all others) has never seen; it is left out of means
    and of the loss. The means are taken after training, in evaluation mode. No global student.
    """

    gamma: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        if not state:
            return {}
        place = (state["present"] == client).nonzero().flatten()
        return {"means": state["others"][place[0]] if len(place) else state["all"]}

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        table = request.get("means", torch.zeros(kit.classes, kit.classes)).to(kit.device)

        def objective(logits: Tensor, labels: Tensor) -> Tensor:
            wanted = torch.nn.functional.one_hot(labels, kit.classes) + self.gamma * table[labels]
            return -(wanted * logits.log_softmax(-1)).sum(-1).mean()

        weights = kit.fit(client, kit.own(client), objective=objective)
        probs = kit.predict(client.model, weights, client.data.pixels).double().softmax(-1)
        means, _ = class_means(probs, client.data.labels, kit.classes)
        return Update({"means": means}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {"means": (kit.classes, kit.classes)}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        means = torch.stack([update.tensors["means"] for update in updates.values()])
        logits, has = means.clamp_min(1e-30).log(), (means.sum(-1) > 0).float()
        others = aggregators.leave_one_out(logits, has) * (has.sum(0) > has)[..., None]
        everyone = aggregators.mean_probs(logits, has) * (has.sum(0) > 0)[:, None]
        return {"present": torch.tensor(list(updates)), "others": others, "all": everyone}


def class_means(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean [C, D] of the values [N, D] of each class, zeros for none, and how many there are [C]."""
    labels = labels.cpu()
    sums = torch.zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    counts = torch.bincount(labels, minlength=classes)
    return (sums / counts.clamp_min(1)[:, None]).float(), counts
