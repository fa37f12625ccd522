"""CFD (Sattler et al., 2020): few bits in both directions, and distillation on both sides.

The soft labels that clients upload go through a quantizer, a delta coder and an entropy coder; so do the student's
soft labels on the downlink. Clients keep no model: in each round they start from the common initial weights, distill
the student's labels and then train, so that an absent client misses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveInt

from fedkd.algorithms.ensemble import Downlink, Ensemble, soft_cross_entropy
from fedkd.core.soft_labels import probabilities

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Distillation, Setup, Update
    from fedkd.core.tensors import Tensors

Bits = Annotated[int, Field(ge=1, le=32)]


@dataclass(frozen=True)
class CFD(Ensemble):
    """CFD (Sattler et al., 2020): quantized soft labels in both directions, distillation on both sides.

    ``uplink_bits`` and ``downlink_bits`` of constrained quantization (1 to 8; 32: none); ``delta`` coding or not.
    """

    ignores: ClassVar[frozenset[str]] = frozenset({"aggregator", "temperature", "loss"})
    uplink: ClassVar[str] = "probs"
    downlink: Downlink = "labels"
    local_distill_epochs: PositiveInt = 5
    uplink_bits: Bits = 1
    downlink_bits: Bits = 1
    delta: bool = True

    def __post_init__(self) -> None:
        if self.downlink != "labels":
            raise ValueError("the downlink carries labels")
        if not all(bits <= 8 or bits == 32 for bits in (self.uplink_bits, self.downlink_bits)):
            raise ValueError("uplink-bits and downlink-bits are 1 to 8, or 32")

    @property
    def codecs(self) -> tuple[str, str]:
        uplink, downlink = (
            "float32" if bits == 32 else f"bits:bits={bits},coder=range,delta={self.delta}"
            for bits in (self.uplink_bits, self.downlink_bits)
        )
        return uplink, downlink

    def distillation(self, setup: Setup) -> Distillation:
        return soft_cross_entropy(setup)

    def train_client(self, setup: Setup, client: Client, message: Tensors) -> dict[str, Tensor]:
        initial = setup.trainer.initial_weights(client.model)
        return setup.trainer.train(client, self.distill_client(setup, client, initial, message))

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        new = super().aggregate(setup, state, updates, seed)
        logits = setup.proxy_logits(setup.student, self.global_model(setup, new), int(state["round"]))
        return {**new, "probs": probabilities(logits)}
