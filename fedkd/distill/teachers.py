"""Teachers: trained here and cached, read from a file, or ranked in a directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import cache, notes, seeds, specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import DataError
from fedkd.distill import teacher_names
from fedkd.distill.train import build_untrained
from fedkd.training import loop, models, quality
from fedkd.training.layers import Outputs
from fedkd.training.models import checkpoint
from fedkd.training.models.checkpoint import Student
from fedkd.training.terms.objective import teacher_weights

if TYPE_CHECKING:
    from fedkd.data.scaling import Scaling
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.progress import Progress
    from fedkd.distill.task import Task

LAYOUT = 4  # version of the training of teachers, part of the cache key; increase it when the training changes


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network: frozen, in evaluation mode, for input scaled as the task's."""

    name: str
    module: nn.Module
    origin: str  # where its weights come from, as text
    unseen_validation: bool = True  # whether the validation images were certainly held out of its training


def obtain(task: Task, config: DistillConfig, texts: Sequence[str], progress: Progress) -> list[Teacher]:
    """The teachers of these specs, in order. A repeated spec gives another network, trained with another seed.

    Their seeds differ from those of the students, so that no teacher is identical to the baseline student.

    Raises:
        DataError: a file cannot be used.

    """
    obtained: list[Teacher] = []
    for index, text in enumerate(texts):
        if teacher_names.is_path(text):
            student = checkpoint.load(Path(text).expanduser())
            unseen_validation = student.dataset == task.dataset and student.held_out >= len(task.validation)
            module = frozen(_module_of(task, config, text, student))
            obtained.append(Teacher(text, module, f"read from {Path(text).name}", unseen_validation))
            continue
        spec, path = models.pretrained(text)
        if path is not None:
            obtained.append(Teacher(text, frozen(untrained(task, config, text)), f"read from {path.name}", False))
            continue
        epochs = config.teacher_epochs or config.epochs
        before = texts[:index].count(text)
        name = f"{text} ({before + 1})" if before else text
        module = trained(task, config, spec, epochs, seeds.derive(0, "teacher", before), name, progress)
        obtained.append(Teacher(text, frozen(module), f"trained here for {epochs} epochs"))
    return obtained


def untrained(task: Task, config: DistillConfig, text: str) -> nn.Module:
    """The network of a spec before training: with the weights of its file, if it has one.

    Raises:
        DataError: a file cannot be used.

    """
    if teacher_names.is_path(text):
        return _module_of(task, config, text, checkpoint.load(Path(text).expanduser()))
    spec, path = models.pretrained(text)
    module, note = checkpoint.initial(text, task.classes, config.norm, config.seed)
    if note:
        raise DataError(f"The weights in {path} do not fit: the teacher must be a {spec} with {task.classes} classes.")
    return module.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def trained(
    task: Task, config: DistillConfig, model: str, epochs: int, seed: int, name: str, progress: Progress
) -> nn.Module:
    """A network trained on the labels only. It is cached by its data and settings.

    Only networks of fedkd and torchvision are cached, without pretrained weights: code and files may change.
    """
    config = dataclasses.replace(config, seed=seed)
    module = build_untrained(task, config, model)

    def weights() -> dict[str, Tensor]:
        progress.train(name, module, task, config, epochs=epochs, seed=seed)
        return loop.weights_of(module)

    spec, file = models.pretrained(model)
    if file or specs.parse(spec).name not in CATALOG["model"] or progress.is_finished(name, epochs):
        weights()
        return module
    module.load_state_dict(cache.get(f"teachers/{_key(task, config, model, epochs)}", weights))
    progress.keep(name, module, task, epochs)
    return module


def _key(task: Task, config: DistillConfig, model: str, epochs: int) -> str:
    """A file name that hashes everything the weights depend on."""
    numbers = (config.norm, epochs, config.batch_size, config.learning_rate, config.momentum, config.weight_decay)
    device = task.device if task.device == "cpu" else f"{task.device}, {task.precision}"
    run = (config.augment and task.flip, config.augment, config.seed, config.threads, device)
    machine = (torch.__version__, version("torchvision"), torch.backends.cpu.get_cpu_capability())
    parts = [LAYOUT, model, *numbers, *run, task.digest, *machine]
    if config.schedule != "cosine":  # of networks that were cached before there were others
        parts.append(config.schedule)
    prefix = "".join(letter if letter.isalnum() else "-" for letter in model).strip("-")
    return f"{prefix}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def student_of(task: Task, config: DistillConfig, model: str, module: nn.Module) -> Student:
    """The content of a student's file for a trained network."""
    (spec, _), pixels = models.pretrained(model), task.test.pixels.shape[1]
    metadata = (spec, config.norm, task.classes, task.test.names, pixels, task.scaling, task.dataset)
    return Student(*metadata, loop.weights_of(module), config.resize, len(task.validation))


def _module_of(task: Task, config: DistillConfig, text: str, student: Student) -> nn.Module:
    """The network of a student from a file or a run directory, for input scaled as the task's."""
    if (student.classes, student.pixels) != (task.classes, task.test.pixels.shape[1]):
        raise DataError(
            f"{text} has {student.classes} classes of {student.pixels} pixels, {task.dataset} has {task.classes} "
            f"of {task.test.pixels.shape[1]}; name a teacher with the same."
        )
    if student.names and task.test.names and student.names != task.test.names:
        raise DataError(f"{text} has other classes than {task.dataset}, or another order of them.")
    if student.resize != config.resize:
        notes.say(f"{text} was trained with --resize {student.resize}, and is given images with {config.resize}.")
    module: nn.Module = student.module().to(task.device)
    if student.scaling != task.scaling:
        rescale(module, task.scaling, student.scaling)
    return module


def frozen(module: nn.Module) -> nn.Module:
    """The module itself, set to evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)


def rescale(module: nn.Module, source: Scaling, target: Scaling) -> None:
    """Convert a network's input from the scaling ``source`` to the scaling ``target`` that it was trained with.

    This is a forward pre-hook, so that the names of the layers do not change.
    """
    device = next(module.parameters()).device  # constants of the host would be copied there in every step
    mean, std = (torch.tensor([getattr(s, key) for s in (source, target)]).to(device) for key in ("mean", "std"))
    factor, offset = (std[0] / std[1])[:, None, None], ((mean[0] - mean[1]) / std[1])[:, None, None]
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor.to(inputs[0]) + offset.to(inputs[0]),))


class TeacherEnsemble(nn.Module):
    """Several teachers as one network: the logarithm of the weighted mean of their probabilities [B, C].

    The weighting ``agreement`` needs labels, which are not available here: it is replaced by ``uniform``.
    """

    def __init__(self, teachers: Sequence[nn.Module], weighting: str = "uniform") -> None:
        super().__init__()
        self.teachers, self.weighting = nn.ModuleList(teachers), weighting

    def forward(self, x: Tensor) -> Tensor:
        outputs = [Outputs(teacher(x), {}) for teacher in self.teachers]
        unused_labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        weights = teacher_weights(
            outputs, unused_labels, "uniform" if self.weighting == "agreement" else self.weighting
        )
        logits = torch.stack([each.logits for each in outputs])
        return (logits.log_softmax(-1) + weights.log()[..., None]).logsumexp(0)


def rank(
    task: Task, config: DistillConfig, teachers: Sequence[Teacher], temperature: float
) -> list[dict[str, float | int | str]]:
    """The teachers from best to worst with their measurements on the validation images.

    A teacher is competitive if its accuracy is within two standard errors of the best accuracy. Competitive teachers
    are ordered by the mean of four ranks: accuracy (higher is better), expected calibration error (lower), entropy of
    the soft labels at the temperature in nats (higher), and capacity gap |log(parameters / the student's)| (lower;
    Mirzadeh et al., 2020). The others follow in the order of accuracy. This is a heuristic without fitted weights.
    """
    student_parameters = sum(p.numel() for p in build_untrained(task, config, config.student).parameters())
    rows: list[dict[str, float | int | str]] = []
    for teacher in teachers:
        logits = loop.predict(teacher.module, task.validation.pixels, task.scaling)
        log_probs = (logits.double() / temperature).log_softmax(-1)
        parameters = sum(p.numel() for p in teacher.module.parameters())
        rows.append(
            {
                "teacher": teacher.name,
                "origin": teacher.origin,
                "unseen_validation": teacher.unseen_validation,
                "accuracy": loop.score(logits, task.validation.labels)[0],
                "ece": quality.ece(logits, task.validation.labels),
                "entropy": -(log_probs.exp() * log_probs).sum(-1).mean().item(),
                "parameters": parameters,
                "gap": abs(float(torch.tensor(parameters / student_parameters).log())),
            }
        )
    best = max(float(row["accuracy"]) for row in rows)
    standard_error = (2 * max(best * (1 - best), 1 / len(task.validation)) / len(task.validation)) ** 0.5
    for row in rows:
        row["is_competitive"] = float(row["accuracy"]) >= best - 2 * standard_error
    competitive = [row for row in rows if row["is_competitive"]]
    for key, sign in (("accuracy", -1), ("ece", 1), ("entropy", -1), ("gap", 1)):
        for row in competitive:
            row[f"{key}_rank"] = 1 + sum(sign * float(other[key]) < sign * float(row[key]) for other in competitive)
    for row in competitive:
        row["mean_rank"] = sum(int(row[f"{key}_rank"]) for key in ("accuracy", "ece", "entropy", "gap")) / 4

    def order(row: dict[str, float | int | str]) -> tuple[bool, float, float]:
        return (
            not row["is_competitive"],
            float(row["mean_rank"]) if row["is_competitive"] else 0.0,
            -float(row["accuracy"]),
        )

    return sorted(rows, key=order)
