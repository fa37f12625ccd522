"""FedProto (Tan et al., 2022): no proxy; the mean embedding of each class up and down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from fedkd.algorithms.base import Algorithm, Client, Update
from fedkd.algorithms.fd import class_means
from fedkd.core.errors import UsageError
from fedkd.core.lazy import torch
from fedkd.core.tensors import put, shapes

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class FedProto(Algorithm):
    """A client minimizes CE + pull * mean((embedding - its class's prototype)^2).

    The number of images of each class goes up as well, as the paper's weights need it. Models may differ,
    embeddings (what the last linear layer sees) must be of one width. No global student.
    """

    pull: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 1.0

    def init(self, kit: Kit) -> Tensors:
        widths = {model: _width(kit, model) for model in kit.models}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{width} ({model})" for model, width in widths.items())
            raise UsageError(f"fedproto needs embeddings of one width, these have {listed}; change --model.")
        width = widths[kit.models[0]]
        return {"prototypes": torch.zeros(kit.classes, width), "counts": torch.zeros(kit.classes, dtype=torch.int64)}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        return state

    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        known, is_known = request["prototypes"].to(kit.device), (request["counts"] > 0).to(kit.device)

        def objective(output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
            logits, embedding = output
            distance = (embedding - known[labels]).square().mean(-1) * is_known[labels]
            return torch.nn.functional.cross_entropy(logits, labels) + self.pull * distance.mean()

        weights = kit.fit(client, kit.own(client), objective=objective, embedded=True)
        embeddings = kit.embed(client.model, weights, client.data.pixels)
        prototypes, counts = class_means(embeddings, client.data.labels, kit.classes)
        return Update({"prototypes": prototypes, "counts": counts}, len(client.data)), put("model", weights)

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        return shapes(state)

    def objection(self, kit: Kit, update: Update) -> str:
        counts = update.tensors["counts"]
        return "" if (counts >= 0).all() and counts.sum() == update.examples else "sent counts that do not add up"

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        counts = torch.stack([update.tensors["counts"] for update in updates.values()])
        prototypes = torch.stack([update.tensors["prototypes"] for update in updates.values()]).double()
        total = counts.sum(0)
        mean = (counts[..., None] * prototypes).sum(0) / total.clamp_min(1)[:, None]
        is_new = total > 0  # a class that nobody had this time keeps its prototype
        return {
            "prototypes": torch.where(is_new[:, None], mean.float(), state["prototypes"]),
            "counts": torch.where(is_new, total, state["counts"]),
        }


def _width(kit: Kit, model: str) -> int:
    try:
        return kit.embed(model, kit.initial(model), kit.proxy[:1]).shape[1]
    except ValueError as error:
        raise UsageError(f"fedproto cannot use --model {model}: {error}.") from error
