"""The module of every exported file: a network that includes the scaling of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkd.data.scaling import Scaling


class WithScaling(nn.Module):
    """A network that takes pixels uint8 [N, P, P, 3] and returns logits float32 [N, C].

    It has the arithmetic of `Scaling`, whose cached tensors cannot be traced.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(scaling.mean))
        self.register_buffer("std", torch.tensor(scaling.std))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))
        return logits
