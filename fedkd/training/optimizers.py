"""SGD and Adam with PyTorch's functional kernels.

Creating an optimizer of ``torch.optim`` imports the compiler, which costs a second and 150 MB in every process.
The kernels are the same, so the results are bitwise equal (tests/training/test_loop.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam as adam_kernel
from torch.optim.sgd import sgd as sgd_kernel

#: Updates the parameters of the optimizer by one step and clears their gradients.
Step = Callable[[], None]


def cosine(peak: float, steps: int) -> Tensor:
    """The learning rate of each of ``steps`` steps, from ``peak`` towards zero (Loshchilov and Hutter, 2017)."""
    values = [peak * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    return torch.tensor(values, dtype=torch.float64)


def sgd(
    parameters: Sequence[Tensor],
    learning_rate: float | Tensor,
    momentum: float,
    weight_decay: float,
    velocities: list[Tensor | None] | None = None,
    start: int = 0,
) -> Step:
    """Stochastic gradient descent with momentum and L2 regularization, as ``torch.optim.SGD``.

    ``learning_rate`` may be a tensor with that of each step. To continue, pass the ``velocities`` of the trainable
    parameters (updated in place) and the number of steps taken.
    """
    trainable = _trainable(parameters)
    velocities = [None] * len(trainable) if velocities is None else velocities
    rate = _next_of(learning_rate, start, trainable) if isinstance(learning_rate, Tensor) else lambda: learning_rate

    def step() -> None:
        sgd_kernel(
            trainable,
            _pop_gradients(trainable),
            velocities,
            fused=True,
            lr=rate(),
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    return step


def adam(parameters: Sequence[Tensor], learning_rate: float, state: list[Tensor] | None = None) -> Step:
    """Adam (Kingma and Ba, 2015) with its default constants, as ``torch.optim.Adam``.

    ``state`` are the tensors that it keeps, all zeros: see `state_of`.
    """
    trainable = _trainable(parameters)
    state = state_of(adam, parameters) if state is None else state
    means, squares, counts = (state[i * len(trainable) : (i + 1) * len(trainable)] for i in range(3))

    def step() -> None:
        adam_kernel(
            trainable,
            _pop_gradients(trainable),
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


def state_of(optimizer: Callable[..., Step], parameters: Sequence[Tensor]) -> list[Tensor]:
    """What an optimizer keeps of its trainable parameters, all zeros.

    For `sgd` the velocities; for `adam` the means, then the squares, then the numbers of steps.
    """
    trainable = _trainable(parameters)
    velocities = [torch.zeros_like(p) for p in trainable]
    if optimizer is sgd:
        return velocities
    return [*velocities, *map(torch.zeros_like, velocities), *(torch.zeros((), device=p.device) for p in trainable)]


def _next_of(rates: Tensor, start: int, parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    """One rate at each call. Both the rates and their count are on the device, so that a step can be recorded."""
    device = parameters[0].device
    rates = rates.to(device, torch.float64 if device.type == "cpu" else torch.float32)  # as the kernels read them
    count = torch.full((1,), start, device=device)

    def rate() -> Tensor:
        now = rates.index_select(0, count)[0]
        count.add_(1)
        return now

    return rate


def _trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad]


def _pop_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients, which are removed from the parameters; zeros for parameters that the loss does not depend on.

    ``backward`` gives them the memory layout of their parameters, as the kernels need.
    """
    gradients = []
    for parameter in parameters:
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return gradients
