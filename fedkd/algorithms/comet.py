"""COMET (Cho et al., 2022): clients are clustered by their soft labels; each is held near its cluster's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.core.lazy import torch
from fedkd.core.tensors import integer, put

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class COMET(Algorithm):
    """A client trains with cross-entropy on its rows and ``pull`` * ||p - z|| on the proxy's.

    z are the labels of the nearest of all centroids, which a client finds by its own answers: so one that
    was absent is served like any other. No global student.
    """

    clusters: PositiveInt = 2
    pull: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def init(self, kit: Kit) -> Tensors:
        return {"round": integer(1)}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        weights, centroids = kit.own(client), [request[n] for n in sorted(request) if n.endswith("/probs")]
        if centroids:
            rows = kit.subset(int(request["told"]))
            own = kit.predict(client.model, weights, kit.proxy[rows]).double().softmax(-1)
            nearest = min(centroids, key=lambda z: (own - z).square().sum().item())
            weights = kit.fit_jointly(client, weights, rows, nearest, self.distance)
        else:
            weights = kit.fit(client, weights)
        probs = aggregators.probabilities(kit.answer(client, weights, int(request["round"])))
        return Update({"probs": probs}, len(client.data)), put("model", weights)

    def distance(self, student_logits: Tensor, probs: Tensor) -> Tensor:
        """The mean over images of pull * ||softmax(s) - z||."""
        return self.pull * (student_logits.softmax(-1) - probs).square().sum(-1).add(1e-12).sqrt().mean()

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return {"probs": kit.answers()}

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        probs = torch.stack([update.tensors["probs"] for update in updates.values()])
        centroids, _ = aggregators.clustered(probs, self.clusters, seed)
        named = {f"{place:04d}/probs": centroid for place, centroid in enumerate(centroids.float())}
        return {"round": state["round"] + 1, "told": state["round"], **named}
