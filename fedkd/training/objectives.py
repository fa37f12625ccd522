"""Objectives and penalties of clients that compute together: what lets one call serve all of them.

An objective compares outputs with targets and a penalty gets the named parameters; both return a scalar. Any function
will do. One call serves all clients of a stack if their functions are equal (==), as are functions of a module, methods
of one object, and frozen dataclasses with equal fields. Closures are not: a `Bound` function is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors
    from fedkd.training.loop import Objective

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Bound:
    """An objective or a penalty with named tensors of one client, the last argument of ``function``."""

    function: Callable[..., Tensor]
    tensors: Tensors

    def __call__(self, *arguments: Any) -> Tensor:
        """The value of the function."""
        return self.function(*arguments, self.tensors)


def function_of(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """What may be equal for several clients: the function without its tensors."""
    return function.function if isinstance(function, Bound) else function


def on_device(function: Function, device: torch.device) -> Function:
    """The same objective or penalty with its tensors on a device, if it has any."""
    if not isinstance(function, Bound):
        return function
    return replace(function, tensors={name: tensor.to(device) for name, tensor in function.tensors.items()})


def mean_over_samples(objective: Function) -> Function:
    """Declare that an objective is the mean of its values for batches of one sample."""
    objective.is_mean_over_samples = True  # type: ignore[attr-defined]
    return objective


def of_samples(objective: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """What returns the losses [B] of samples, of which the objective is the mean; None if it is not declared one.

    Its arguments are those of the objective. Nothing in it waits for a GPU.
    """
    if objective is torch.nn.functional.cross_entropy:
        return partial(torch.nn.functional.cross_entropy, reduction="none")
    if isinstance(objective, LabelSmoothed | Softened | Joint):
        return objective.of_samples
    declared = objective.func if isinstance(objective, partial) else objective
    return partial(_of_samples, objective) if getattr(declared, "is_mean_over_samples", False) else None


def _of_samples(objective: Callable[..., Tensor], output: Any, targets: Tensor, *tensors: Tensors) -> Tensor:
    from torch.utils import _pytree as pytree

    output, targets = pytree.tree_map(lambda rows: rows[:, None], (output, targets))
    losses: Tensor = torch.vmap(objective, (0, 0, *[None] * len(tensors)))(output, targets, *tensors)
    return losses


@dataclass(frozen=True)
class LabelSmoothed:
    """The cross-entropy with labels of which a share is spread over all classes (Szegedy et al., 2016)."""

    share: float

    def __call__(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of a batch."""
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=self.share, reduction=reduction)

    @property
    def of_samples(self) -> Objective:
        """See the function."""
        return partial(self, reduction="none")


@dataclass(frozen=True)
class Softened:
    """T^2 * loss(student logits / T, teacher probs): gradients keep their size (Hinton et al., 2015)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    temperature: float

    def __call__(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.temperature**2 * self.loss(student_logits / self.temperature, teacher_probs)

    @property
    def of_samples(self) -> Objective | None:
        """See the function."""
        each = of_samples(self.loss)
        return each and replace(self, loss=each)


@dataclass(frozen=True)
class Joint:
    """The mean loss over samples with labels and samples with soft labels.

    Targets [B, C + 1] are labels, one-hot, or soft labels; the last column is 1 for soft labels.
    """

    objective: Objective
    soft_objective: Objective

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        is_soft = targets[:, -1] > 0
        labels = targets[~is_soft, :-1].argmax(-1)
        losses = [
            loss(logits[mask], kind) * len(kind)
            for loss, mask, kind in (
                (self.objective, ~is_soft, labels),
                (self.soft_objective, is_soft, targets[is_soft, :-1]),
            )
            if len(kind)
        ]
        return torch.stack(losses).sum() / len(targets)

    @property
    def of_samples(self) -> Objective | None:
        """See the function. Each sample has a loss of both kinds, one of which counts."""
        hard, soft = of_samples(self.objective), of_samples(self.soft_objective)
        if hard is None or soft is None:
            return None

        def losses(logits: Tensor, targets: Tensor) -> Tensor:
            probs = targets[:, :-1]
            return torch.where(targets[:, -1] > 0, soft(logits, probs), hard(logits, probs.argmax(-1)))

        return losses
