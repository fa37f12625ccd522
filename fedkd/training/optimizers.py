"""SGD, Adam and AdamW with PyTorch's functional kernels.

Creating an optimizer of ``torch.optim`` imports the compiler, which costs a second and 150 MB in every process.
The kernels are the same, so the results are bitwise equal (tests/training/test_loop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    #: Updates the parameters of the optimizer by one step at a learning rate, and clears their gradients. To be
    #: recorded, a step needs the rate as a tensor on the device.
    Step = Callable[[float | Tensor], None]

Beta = Annotated[float, Field(ge=0, lt=1)]


def sgd(
    parameters: Sequence[Tensor],
    momentum: float,
    weight_decay: float,
    velocities: list[Tensor | None] | None = None,
    *,
    nesterov: bool = False,
) -> Step:
    """Stochastic gradient descent with momentum and L2 regularization, as ``torch.optim.SGD``.

    To continue, pass the ``velocities`` of the trainable parameters, which are updated in place.
    """
    from torch.optim.sgd import sgd as kernel

    trainable = _trainable(parameters)
    velocities = [None] * len(trainable) if velocities is None else velocities

    def step(rate: float | Tensor) -> None:
        kernel(
            trainable,
            _pop_gradients(trainable),
            velocities,
            fused=True,
            lr=rate,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
        )

    return step


def adam(
    parameters: Sequence[Tensor],
    weight_decay: float = 0.0,
    state: list[Tensor] | None = None,
    *,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
) -> Step:
    """Adam with L2 regularization (Kingma and Ba, 2015), as ``torch.optim.Adam``.

    ``state`` are the tensors that it keeps, all zeros: see `state_of`.
    """
    return _adam(parameters, weight_decay, state, (beta1, beta2), is_decoupled=False)


def adamw(
    parameters: Sequence[Tensor],
    weight_decay: float = 0.0,
    state: list[Tensor] | None = None,
    *,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
) -> Step:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as ``torch.optim.AdamW``.

    ``state``: see `adam`.
    """
    return _adam(parameters, weight_decay, state, (beta1, beta2), is_decoupled=True)


def _adam(
    parameters: Sequence[Tensor],
    weight_decay: float,
    state: list[Tensor] | None,
    betas: tuple[float, float],
    is_decoupled: bool,
) -> Step:
    from torch.optim.adam import adam as kernel

    trainable = _trainable(parameters)
    state = state_of(adam, parameters) if state is None else state
    means, squares, counts = (state[i * len(trainable) : (i + 1) * len(trainable)] for i in range(3))

    def step(rate: float | Tensor) -> None:
        kernel(
            trainable,
            _pop_gradients(trainable),
            means,
            squares,
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
            decoupled_weight_decay=is_decoupled,
        )

    return step


def clipped(
    step: Step,
    parameters: Sequence[Tensor],
    most: float,
    of_clients: Callable[[Tensor], Tensor] = lambda one: one[None],
) -> Step:
    """The same after gradients were scaled to a norm of at most ``most``, as ``torch.nn.utils.clip_grad_norm_``.

    The norm is that of all gradients of a client; ``of_clients`` makes tensors [K, ...] of them.
    """
    trainable = _trainable(parameters)

    def clipped_step(rate: float | Tensor) -> None:
        gradients = [of_clients(p.grad) for p in trainable if p.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (most / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
        step(rate)

    return clipped_step


def state_of(optimizer: Callable[..., Step], parameters: Sequence[Tensor]) -> list[Tensor]:
    """What an optimizer keeps of its trainable parameters, all zeros.

    For `sgd` the velocities; for the others the means, then the squares, then the numbers of steps.
    """
    trainable = _trainable(parameters)
    velocities = [torch.zeros_like(p) for p in trainable]
    if (optimizer.func if isinstance(optimizer, partial) else optimizer) is sgd:
        return velocities
    return [*velocities, *map(torch.zeros_like, velocities), *(torch.zeros((), device=p.device) for p in trainable)]


def rates_for(rates: Sequence[float], steps: int, device: torch.device) -> Tensor:
    """The learning rate of each of so many steps, in the type that the kernels of a device read."""
    each = [rates[min(number, len(rates) - 1)] for number in range(steps)]
    return torch.tensor(each, dtype=torch.float64 if device.type == "cpu" else torch.float32)


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
