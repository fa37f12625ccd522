"""FD (Jeong et al., 2018): no proxy set; the mean output for each label up, that of the other clients down.

FedDistill+ is FD with averaged weights, from the comparison of FedGen (Zhu et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, take, weighted_mean
from fedkd.training.losses.logits import cross_entropy
from fedkd.training.objectives import Bound, mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class FD(Algorithm):
    """FD (Jeong et al., 2018): mean outputs for each label are exchanged; no proxy set, no global student.

    A client minimizes CE(label) + gamma * CE(mean output of the other clients for this label).

    A row of zeros stands for a label that a client (or every other client) has no samples of; it is left out of
    means and of the loss. The means are taken after training, in evaluation mode.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | STUDENT | {"label_smoothing"}
    gamma: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        if "all" not in state:
            return {}
        place = (state["present"] == client).nonzero().flatten()
        return {"means": state["others"][place[0]] if len(place) else state["all"]}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights, means = self.trained(setup, client, setup.local_weights(client), message)
        return Update({"means": means}, len(client.data)), put("model", weights)

    def trained(self, setup: Setup, client: Client, start: Tensors, message: Tensors) -> tuple[Tensors, Tensor]:
        """The weights after local training from ``start``, and their mean outputs [C, C] for each label."""
        others = message.get("means", torch.zeros(setup.classes, setup.classes))
        objective = Bound(by_label, {"targets": torch.eye(setup.classes) + self.gamma * others})
        weights = setup.trainer.train(client, start, objective=objective)
        probs = setup.trainer.predict(client.model, weights, client.data.pixels).double().softmax(-1)
        means, _ = class_means(probs, client.data.labels, setup.classes)
        return weights, means

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {"means": (setup.classes, setup.classes)}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        means = torch.stack([update.tensors["means"] for update in updates.values()])
        logits, has = means.clamp_min(1e-30).log(), (means.sum(-1) > 0).float()
        others = aggregators.leave_one_out(logits, has) * (has.sum(0) > has)[..., None]
        everyone = aggregators.mean_probs(logits, has) * (has.sum(0) > 0)[:, None]
        return {"present": torch.tensor(list(updates)), "others": others, "all": everyone}


@dataclass(frozen=True)
class FedDistillPlus(FD):
    """FedDistill+ (in Zhu et al., 2021): FedAvg and FD at once; weights and mean outputs for each label.

    A client starts from the global student and minimizes the loss of FD.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION | {"label_smoothing"}

    @property
    def needs_one_model(self) -> bool:
        return True

    def initial_state(self, setup: Setup) -> Tensors:
        return put("student", setup.trainer.initial_weights(setup.student))

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return {**put("student", take("student", state)), **super().broadcast(setup, state, client)}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights, means = self.trained(setup, client, take("student", message), message)
        return Update({**put("student", weights), "means": means}, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        weights = setup.trainer.weight_shapes(setup.student)
        return {
            **{f"student/{name}": shape for name, shape in weights.items()},
            **super().upload_spec(setup, client, number),
        }

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        examples = [update.examples for update in updates.values()]
        mean = weighted_mean([take("student", update.tensors) for update in updates.values()], examples)
        return {**put("student", mean), **super().aggregate(setup, state, updates, seed)}

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)


@mean_over_samples
def by_label(logits: Tensor, labels: Tensor, tensors: Tensors) -> Tensor:
    """The cross-entropy with the row of ``targets`` [C, C] for the label of each sample."""
    return cross_entropy(logits, tensors["targets"][labels])


def class_means(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean [C, D] of the values [N, D] of each class (zeros for none) and the number of samples of each [C]."""
    labels = labels.cpu()
    sums = torch.zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    counts = torch.bincount(labels, minlength=classes)
    return (sums / counts.clamp_min(1)[:, None]).float(), counts
