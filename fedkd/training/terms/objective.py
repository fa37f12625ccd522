"""A student with its teachers, and the loss of all their outputs for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import soft_labels
from fedkd.training import layers
from fedkd.training.layers import Outputs, WatchedModel, WithTeachers
from fedkd.training.objectives import mean_over_samples
from fedkd.training.terms import LayerShapes, label_weight
from fedkd.training.terms.modules import Batch

if TYPE_CHECKING:
    from fedkd.training.terms import Term


class Taught(WithTeachers):
    """A student with its teachers. Its parameters are those of the student, and adapters of a loss in a stack."""

    student: WatchedModel
    teachers: tuple[WatchedModel, ...]

    def __init__(
        self, student: WatchedModel, teachers: Sequence[WatchedModel], adapters: Sequence[nn.Parameter] = ()
    ) -> None:
        super().__init__(student, teachers)
        self.adapters = nn.ParameterList(adapters)


class DistillationObjective(Taught):
    """A student, its teachers and the loss terms. Its parameters are those of the student and of the terms' adapters.

    ``sample`` [B, 3, H, W] is any input, ``labels`` [N] are those of all training samples.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        terms: Sequence[Term],
        sample: Tensor,
        labels: Tensor,
        weighting: str = "uniform",
    ) -> None:
        pair = LayerShapes(
            layers.shapes(student, sample), tuple(layers.shapes(teacher, sample) for teacher in teachers), labels
        )
        modules = [term.build(pair) for term in terms]
        super().__init__(
            WatchedModel(student, [name for module in modules for name in module.student_layers]),
            [
                WatchedModel(
                    teacher, [name for module in modules if module.teacher_layers for name in module.teacher_layers[k]]
                )
                for k, teacher in enumerate(teachers)
            ],
        )
        self.terms = nn.ModuleList(modules)
        self.label_weight, self.weighting = label_weight(terms), weighting

    @property
    def is_mean_over_samples(self) -> bool:
        """Whether `loss` is one (`objectives.mean_over_samples`), and the same for equal adapters."""
        return self.weighting == "uniform" and all(term.is_mean_over_samples for term in self.terms)

    def loss(self, outputs: tuple[Outputs, list[Outputs]], targets: Tensor, *, factor: Tensor | None = None) -> Tensor:
        """The weighted cross-entropy with the labels plus all terms; targets [B, 2]: labels and indices of samples.

        The terms, but not the cross-entropy, are multiplied by ``factor``.
        """
        student, teachers = outputs
        labels, indices = targets.unbind(1)
        batch = Batch(student, teachers, teacher_weights(teachers, labels, self.weighting), labels, indices)
        losses: list[Tensor] = [term(batch) if factor is None else factor * term(batch) for term in self.terms]
        if self.label_weight:
            losses.insert(0, self.label_weight * nn.functional.cross_entropy(student.logits, labels))
        return sum(losses[1:], losses[0])


class _Loss(nn.Module):
    """The loss of an objective as a module, whose parameters are its adapters."""

    def __init__(self, objective: DistillationObjective) -> None:
        super().__init__()
        self.terms, self.forward = objective.terms, objective.loss


def adapted_losses(objectives: Sequence[DistillationObjective]) -> list[Callable[..., Tensor]]:
    """The losses of clients as functions of outputs, targets and the parameters of the terms, instead of their own.

    They are one function if they depend on nothing else.
    """
    if objectives[0].is_mean_over_samples:
        return [mean_over_samples(_adapted(objectives[0]))] * len(objectives)
    return [_adapted(each) for each in objectives]


def _adapted(objective: DistillationObjective) -> Callable[..., Tensor]:
    module = _Loss(objective)
    names = [name for name, _ in module.named_parameters()]

    def loss(outputs: tuple[Outputs, list[Outputs]], targets: Tensor, adapters: Sequence[Tensor]) -> Tensor:
        named = dict(zip(names, adapters, strict=True))
        value: Tensor = torch.func.functional_call(module, named, (outputs, targets))
        return value

    return loss


def teacher_weights(teachers: Sequence[Outputs], labels: Tensor, weighting: str) -> Tensor:
    """The weight of each teacher on each sample [K, B]; the columns sum to one.

    ``entropy``: by the certainty of its probabilities, as for clients in `aggregators.entropy`. ``agreement``: CA-MKD's
    (1 - softmax_k(CE_k)) / (K - 1) of its cross-entropy with the label (Zhang et al., 2022).
    """
    count = len(teachers)
    if count < 2 or weighting == "uniform":
        return torch.full((count, len(labels)), 1 / max(count, 1), device=labels.device)
    logits = torch.stack([outputs.logits for outputs in teachers])
    if weighting == "entropy":
        return soft_labels.certainty(logits, torch.ones(count, 1, device=labels.device)).float()
    costs = torch.stack([nn.functional.cross_entropy(one, labels, reduction="none") for one in logits])
    return (1 - costs.softmax(0)) / (count - 1)
