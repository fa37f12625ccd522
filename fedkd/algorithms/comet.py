"""COMET (Cho et al., 2022): clients are clustered by their soft labels; each is kept near its cluster's mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import DISTILLATION, STUDENT, Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import SoftLabels, probabilities
from fedkd.core.tensors import integer, put
from fedkd.training.objectives import mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors


@dataclass(frozen=True)
class COMET(Algorithm):
    """COMET (Cho et al., 2022): clients are clustered by their soft labels and kept near their cluster's mean z.

    A client minimizes CE on its samples and ``weight`` * ||p - z|| on the proxy samples.

    z is the nearest of all centroids, which a client finds by its own soft labels, so that a client that was absent
    is treated like any other. No global student.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION - {"proxy_samples", "uplink_codec", "downlink_codec"} | STUDENT
    clusters: PositiveInt = 2
    weight: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def initial_state(self, setup: Setup) -> Tensors:
        return {"round": integer(1)}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return state

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.local_weights(client)
        centroids = [message[name] for name in sorted(message) if name.endswith("/probs")]
        if centroids:
            images = setup.proxy.select(setup.proxy.subset(int(message["prev"])))
            own = setup.trainer.predict(client.model, weights, images).double().softmax(-1)
            nearest = min(centroids, key=lambda z: (own - z).square().sum().item())
            soft_labels = SoftLabels(images, nearest)
            weights = setup.trainer.train(client, weights, soft_labels=soft_labels, soft_objective=self.distance)
        else:
            weights = setup.trainer.train(client, weights)
        probs = probabilities(setup.proxy_logits(client.model, weights, int(message["round"])))
        return Update({"probs": probs}, len(client.data)), put("model", weights)

    @mean_over_samples
    def distance(self, student_logits: Tensor, probs: Tensor) -> Tensor:
        """The mean over samples of weight * ||softmax(s) - z||."""
        return self.weight * (student_logits.softmax(-1) - probs).square().sum(-1).add(1e-12).sqrt().mean()

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return {"probs": setup.logits_shape}

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        probs = torch.stack([update.tensors["probs"] for update in updates.values()])
        centroids, _ = aggregators.clustered(probs, self.clusters, seed)
        named = {f"{place:04d}/probs": centroid for place, centroid in enumerate(centroids.float())}
        return {"round": state["round"] + 1, "prev": state["round"], **named}
