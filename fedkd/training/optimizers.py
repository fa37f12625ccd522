"""SGD and Adam by PyTorch's own functional kernels.

``torch.optim``'s classes import the compiler when one is made: a second and 150 MB in every process.
The kernels are the same, and so are the bits (tests/test_learning.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.optim.adam import adam as adam_kernel
from torch.optim.sgd import sgd as sgd_kernel

if TYPE_CHECKING:
    from torch import Tensor

#: Moves the parameters it was made for by one step along their gradients, and forgets these.
Step = Callable[[], None]
#: The learning rate of a step, counted from zero.
Schedule = Callable[[int], float]


def cosine(peak: float, steps: int) -> Schedule:
    """From ``peak`` to zero over so many steps, along half a wave (Loshchilov and Hutter, 2017)."""
    return lambda step: peak * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def sgd(parameters: Sequence[Tensor], learning_rate: float | Schedule, momentum: float, weight_decay: float) -> Step:
    """Stochastic gradient descent with momentum and L2 regularization, as ``torch.optim.SGD``."""
    rates = learning_rate if callable(learning_rate) else lambda _: learning_rate
    taken = itertools.count()
    moved = _trainable(parameters)
    velocities: list[Tensor | None] = [None] * len(moved)

    def step() -> None:
        sgd_kernel(
            moved,
            _spent(moved),
            velocities,
            fused=True,
            lr=rates(next(taken)),
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    return step


def adam(parameters: Sequence[Tensor], learning_rate: float) -> Step:
    """Adam (Kingma and Ba, 2015) with its usual constants, as ``torch.optim.Adam``."""
    moved = _trainable(parameters)
    means, squares = ([torch.zeros_like(p) for p in moved] for _ in range(2))
    counts = [torch.zeros((), device=p.device) for p in moved]

    def step() -> None:
        adam_kernel(
            moved,
            _spent(moved),
            means,
            squares,
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    return step


def _trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad]


def _spent(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients, taken away from the parameters; zero where the loss does not reach.

    They come from ``backward``, which lays them out as their parameters lie: the kernels rely on it.
    """
    gradients = []
    for parameter in parameters:
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return gradients
