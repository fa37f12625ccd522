"""Training a network with or without teachers: one loop for students and teachers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedkd.core import notes, seeds
from fedkd.core.errors import RunError
from fedkd.core.tensors import put, take
from fedkd.training import loop, optimizers, schedules, stacked_loop, together
from fedkd.training.batches import Job
from fedkd.training.models import checkpoint
from fedkd.training.stack import Stack
from fedkd.training.stacked_loop import Learner
from fedkd.training.terms.modules import TermModule
from fedkd.training.terms.objective import DistillationObjective

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.data.readers import Images
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.task import Task
    from fedkd.training.optimizers import Step
    from fedkd.training.precision import Precision
    from fedkd.training.terms import Term


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its number from 1, accuracy and loss on the validation images, and its duration.

    Without validation images accuracy and loss are None. The test accuracy is for tables that report the largest one;
    nothing in training depends on it.
    """

    number: int
    accuracy: float | None
    loss: float | None
    test_accuracy: float
    seconds: float


def build_untrained(task: Task, config: DistillConfig, model: str, *path: int) -> nn.Module:
    """A network before its training here; the same for the same seed and path."""
    module, _ = checkpoint.initial(model, task.classes, config.norm, config.seed, *path)
    return module.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def train(
    module: nn.Module,
    task: Task,
    config: DistillConfig,
    *,
    epochs: int,
    seed: int,
    terms: Sequence[Term] = (),
    teachers: Sequence[nn.Module] = (),
    start: int = 0,
    state: Tensors | None = None,
) -> Iterator[tuple[Epoch, Callable[[], dict[str, Tensor]]]]:
    """Train ``module`` in place on the labels and the loss terms, and yield each epoch, with a function for its state.

    Batches and augmentation depend only on ``seed``, so that students with and without a teacher are paired. To
    continue after epoch ``start``, pass its state.

    Raises:
        RunError: the loss is not finite.

    """
    with seeds.seeded(seeds.derive(seed, "adapters")):
        objective = objective_of(task, config, module, teachers, terms)
    steps = len(loop.batch_sizes(objective, len(task.train), config.batch_size))
    rates = schedules.rates(config.schedule, config.learning_rate, epochs * steps, steps)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    on_gpu = together.pays(task.device)
    velocities: list[Tensor | None] = [torch.zeros_like(p) if on_gpu else None for p in parameters]
    if start:
        _load_state(objective, parameters, velocities, state or {})
    optimizer = optimizers.sgd(parameters, config.momentum, config.weight_decay, velocities)
    targets = torch.stack([task.train.labels, torch.arange(len(task.train))], 1)
    pixels, augmentation = task.train.pixels, loop.Augmentation(config.augment, task.flip)
    options: dict[str, Any] = {"epochs": 1, "batch_size": config.batch_size}
    learner = _learner(objective, optimizer, velocities, task.precision) if on_gpu else None
    factor = torch.ones((), device=task.device)  # a tensor, since a recorded step repeats every number of Python
    loss_of = partial(objective.loss, factor=factor) if config.loss_warmup else objective.loss
    for epoch in range(start + 1, epochs + 1):
        begin, drawn = time.perf_counter(), seeds.derive(seed, "epoch", epoch)
        options["rates"] = rates[(epoch - 1) * steps : epoch * steps]
        factor.fill_(min(epoch / max(config.loss_warmup, 1), 1.0))
        if learner is None:
            options |= {"augmentation": augmentation, "seed": drawn, "precision": task.precision}
            loop.train(objective, optimizer, pixels, targets, loss_of, task.scaling, **options)
        else:
            job = Job(pixels, targets, loss_of, augmentation, drawn)
            stacked_loop.train(learner, [job], task.scaling, **options)
        accuracy, loss = _scored(module, task, task.validation) if len(task.validation) else (None, None)
        test_accuracy, test_loss = _scored(module, task, task.test)
        if not math.isfinite(test_loss if loss is None else loss):
            raise RunError(
                f"Training diverged in epoch {epoch}; "
                f"lower --learning-rate {config.learning_rate:g} or the weight of a loss term."
            )
        done = Epoch(epoch, accuracy, loss, test_accuracy, time.perf_counter() - begin)
        yield done, partial(_state, objective, velocities)


def _scored(module: nn.Module, task: Task, images: Images) -> tuple[float, float]:
    """Accuracy and loss."""
    return loop.score(loop.predict(module, images.pixels, task.scaling, task.precision), images.labels)


def _learner(
    objective: DistillationObjective, step: Step, velocities: list[Tensor | None], precision: Precision
) -> Learner:
    """What trains with a step that is recorded as a CUDA graph, unless a loss term does not allow it."""
    stack = Stack(1, precision)
    learner = Learner(stack.alone(objective), stack, step, cast("list[Tensor]", velocities))
    changing = [type(term).__name__ for term in objective.terms if not cast(TermModule, term).is_always_the_same]
    if changing:
        learner.is_recordable = False
        notes.say(f"training steps with {changing[0]} are not recorded as a CUDA graph, so they are slower")
    return learner


def _state(objective: DistillationObjective, velocities: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Everything that the next epoch depends on, as CPU tensors."""
    state = put("network", loop.weights_of(objective.student.model)) | put("terms", loop.weights_of(objective.terms))
    for place, term in enumerate(objective.terms):
        extra = cast(TermModule, term).extra_state()
        state |= put(f"term{place}", {name: tensor.cpu() for name, tensor in extra.items()})
    return state | put("velocity", {str(i): v.cpu().contiguous() for i, v in enumerate(velocities) if v is not None})


def _load_state(
    objective: DistillationObjective, parameters: Sequence[Tensor], velocities: list[Tensor | None], state: Tensors
) -> None:
    """Restore what `_state` returned."""
    objective.student.model.load_state_dict(take("network", state))
    objective.terms.load_state_dict(take("terms", state))
    for place, term in enumerate(objective.terms):
        cast(TermModule, term).load_extra_state(take(f"term{place}", state))
    for index, velocity in take(
        "velocity", state
    ).items():  # in the memory layout of the parameter, as the kernel needs
        velocities[int(index)] = torch.empty_like(parameters[int(index)]).copy_(velocity)


def objective_of(
    task: Task, config: DistillConfig, module: nn.Module, teachers: Sequence[nn.Module], terms: Sequence[Term]
) -> DistillationObjective:
    """The objective of a student with its teachers."""
    sample = task.scaling(task.train.pixels[:2])
    labels = task.train.labels.to(task.device)
    return DistillationObjective(module, teachers, terms, sample, labels, config.teacher_weighting).to(task.device)
