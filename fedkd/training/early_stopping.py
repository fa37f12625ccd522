"""Early stopping: a training ends when its validation accuracy rises no more, and the best weights are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 100  # steps between measurements, as in FedDF's code


@dataclass(frozen=True, eq=False)
class EarlyStopping:
    """When a training ends: as many steps after that with the best accuracy as ``patience`` says.

    The accuracy is that on held-out images [N, H, W, 3] with their labels [N], every 100 steps, or every ``patience``
    steps if these are fewer, and after the last step. The best is the first one with the highest accuracy.
    """

    images: Tensor
    labels: Tensor
    patience: int


class Best:
    """The best weights of a network in training, at first those that it has.

    ``tensors`` are all of the network's, ``steps`` the most steps that the training has. ``predict`` returns the
    network's logits, ``result`` what the weights would be if the training ended after a step.
    """

    def __init__(
        self,
        stopping: EarlyStopping,
        tensors: Sequence[Tensor],
        steps: int,
        predict: Callable[[Tensor], Tensor],
        result: Callable[[int], Sequence[Tensor]],
    ) -> None:
        self.weights = [tensor.clone() for tensor in tensors]
        self._stopping, self._tensors, self._steps = stopping, tensors, steps
        self._predict, self._result = predict, result
        self._step, self._accuracy = 0, -1.0

    def ends(self, step: int) -> bool:
        """Whether the training ends after a step."""
        patience = self._stopping.patience
        if step % min(EVERY, patience) and step < self._steps:
            return False
        own, weights = ([tensor.clone() for tensor in each] for each in (self._tensors, self._result(step)))
        _put(weights, self._tensors)
        logits = self._predict(self._stopping.images)
        _put(own, self._tensors)
        accuracy = (logits.argmax(-1) == self._stopping.labels).double().mean().item()
        if accuracy > self._accuracy:
            self._step, self._accuracy, self.weights = step, accuracy, weights
        return step - self._step >= patience


def mean_after(step: int, tensors: Sequence[Tensor], sums: Sequence[Tensor], ends: Collection[int]) -> Sequence[Tensor]:
    """The mean of tensors after each epoch, the last of which ends with this step; integers are those of this step.

    ``sums`` are those over the epochs that have ended, after the steps ``ends``.
    """
    is_end = step in ends
    epochs = sum(end <= step for end in ends) + (not is_end)
    wholes = sums if is_end else [total + tensor for tensor, total in zip(tensors, sums, strict=True)]
    pairs = zip(tensors, wholes, strict=True)
    return [whole / epochs if tensor.is_floating_point() else tensor for tensor, whole in pairs]


def _put(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
