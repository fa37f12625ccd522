"""CFD (Sattler et al., 2020): few bits up and down, and distillation on both sides.

Clients' answers go through a quantizer, a delta coder and an entropy coder; so do the student's own
answers, which come back. Clients keep nothing: each starts anew, from one common initial model, distills
the student's labels and then trains, so that an absent client misses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from fedkd.algorithms.aggregators import probabilities
from fedkd.algorithms.ensemble import OwnTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Client, Update
    from fedkd.core.tensors import Tensors
    from fedkd.training.trainer import Kit

Bits = Annotated[int, Field(ge=1, le=32)]


@dataclass(frozen=True)
class CFD(OwnTeacher):
    """``up_bits`` and ``down_bits`` of constrained quantization (1 to 8; 32 for none); ``delta`` coding or not."""

    digest_epochs: PositiveInt = 5
    up_bits: Bits = 1
    down_bits: Bits = 1
    delta: bool = True

    def __post_init__(self) -> None:
        if self.down != "labels":
            raise ValueError("what comes down are labels")
        if not all(bits <= 8 or bits == 32 for bits in (self.up_bits, self.down_bits)):
            raise ValueError("up_bits and down_bits are 1 to 8, or 32")

    @property
    def codecs(self) -> tuple[str, str]:
        up, down = (
            "float32" if bits == 32 else f"bits:bits={bits},coder=range,delta={self.delta}"
            for bits in (self.up_bits, self.down_bits)
        )
        return up, down

    def train(self, kit: Kit, client: Client, request: Tensors) -> dict[str, Tensor]:
        fresh = kit.initial(client.model)
        return kit.fit(client, self.digest(self.plain(kit), client, fresh, request))

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        new = super().tell(kit, state, updates, seed)
        answer = kit.predict(kit.student, self.deploy(kit, new), kit.proxy[kit.subset(int(state["round"]))])
        return {**new, "probs": probabilities(answer)}
