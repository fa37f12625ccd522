"""Teachers: trained here and kept, read from a file, or ranked out of a directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import cache, seeds, specs, tensors
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import DataError
from fedkd.distill import teacher_names
from fedkd.distill.train import Epoch, fresh, train
from fedkd.evaluation import quality
from fedkd.models import checkpoint
from fedkd.models.checkpoint import Student
from fedkd.training import loop
from fedkd.training.layers import Outputs
from fedkd.training.terms.objective import teacher_weights

if TYPE_CHECKING:
    from fedkd.data.scaling import Scaling
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.task import Task

LAYOUT = 2  # of how teachers are trained; raise it when that changes

#: Told of every epoch of whoever is trained: the name and the epoch.
Watch = Callable[[str, Epoch], None]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that knows something: frozen, in evaluation mode, on input scaled as the task's."""

    name: str
    module: nn.Module
    origin: str  # how it came to be, in words
    unseen_validation: bool = True  # whether it has certainly not been trained on the validation images


def obtain(task: Task, config: DistillConfig, texts: Sequence[str], watch: Watch) -> list[Teacher]:
    """The teachers that these specs name, in order. The same spec again is another network, of another seed.

    Their seeds are no student's, so that none starts as a student does, or is the student alone under another name.

    Raises:
        DataError: a file that cannot be used.

    """
    found: list[Teacher] = []
    for place, text in enumerate(texts):
        if teacher_names.is_path(text):
            student = checkpoint.load(Path(text).expanduser())
            unseen_validation = student.dataset == task.dataset and student.held_out >= len(task.validation)
            found.append(
                Teacher(
                    text, frozen(_module_of(task, text, student)), f"read from {Path(text).name}", unseen_validation
                )
            )
            continue
        spec, path = teacher_names.pretrained(text)
        if path is not None:
            found.append(Teacher(text, frozen(untrained(task, config, text)), f"read from {path.name}", False))
            continue
        epochs = config.teacher_epochs or config.epochs
        seed = seeds.derive(0, "teacher", texts[:place].count(text))
        module = trained(task, config, spec, epochs, seed, partial(watch, text))
        found.append(Teacher(text, frozen(module), f"trained here for {epochs} epochs"))
    return found


def untrained(task: Task, config: DistillConfig, text: str) -> nn.Module:
    """The network that a spec names, as it is before anything is trained here.

    Raises:
        DataError: a file that cannot be used.

    """
    if teacher_names.is_path(text):
        return _module_of(task, text, checkpoint.load(Path(text).expanduser()))
    spec, path = teacher_names.pretrained(text)
    module = fresh(task, config, spec)
    if path is not None:
        try:
            checkpoint.fill(module, checkpoint.read_weights(path), f"the weights in {path}")
        except DataError as error:
            raise DataError(f"{error} A teacher must be a {spec} that tells {task.classes} classes apart.") from error
    return module


def trained(
    task: Task,
    config: DistillConfig,
    model: str,
    epochs: int,
    seed: int,
    watch: Callable[[Epoch], None],
) -> nn.Module:
    """A network trained on the labels alone. It is kept, and not trained again for the same data and settings.

    Only networks of fedkd and torchvision are kept: other code may change under the same name.
    """
    own = dataclasses.replace(config, seed=seed)
    path = cache.directory() / "teachers" / f"{_key(task, own, model, epochs)}.safetensors"
    module = fresh(task, own, model)
    is_kept = specs.parse(model).name in CATALOG["model"]
    if is_kept and path.is_file():
        try:
            checkpoint.fill(module, checkpoint.read_weights(path), "the weights kept")
            return module
        except DataError:  # a torn or foreign file is made again
            pass
    for epoch in train(module, task, own, epochs=epochs, seed=seed):
        watch(epoch)
    if not is_kept:
        return module
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        student_of(task, own, model, module).save(path)
    except OSError:  # a full or read-only disk costs time at the next run, nothing else
        pass
    return module


def _key(task: Task, config: DistillConfig, model: str, epochs: int) -> str:
    """A name for all that the weights depend on."""
    numbers = (config.norm, epochs, config.batch_size, config.learning_rate, config.momentum, config.weight_decay)
    data = tensors.digest({"pixels": task.train.pixels.cpu(), "labels": task.train.labels})
    run = (config.augment and task.flip, config.augment, config.seed, config.threads, task.device)
    machine = (torch.__version__, version("torchvision"), torch.backends.cpu.get_cpu_capability())
    said = [LAYOUT, model, *numbers, *run, data, *machine]
    words = "".join(letter if letter.isalnum() else "-" for letter in model).strip("-")
    return f"{words}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"


def student_of(task: Task, config: DistillConfig, model: str, module: nn.Module) -> Student:
    """A trained network as a student's file keeps it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    pixels = task.test.pixels.shape[1]
    about = (model, config.norm, task.classes, task.test.names, pixels, task.scaling, task.dataset)
    return Student(*about, weights, len(task.validation))


def _module_of(task: Task, text: str, student: Student) -> nn.Module:
    """The network of a student that was read from a file or a run's directory, for input scaled as the task's."""
    if (student.classes, student.pixels) != (task.classes, task.test.pixels.shape[1]):
        raise DataError(
            f"{text} knows {student.classes} classes of {student.pixels} pixels, {task.dataset} has {task.classes} "
            f"of {task.test.pixels.shape[1]}; name a teacher of the same."
        )
    if student.names and task.test.names and student.names != task.test.names:
        raise DataError(f"{text} knows other classes than {task.dataset}, or in another order.")
    module: nn.Module = student.module().to(task.device)
    if student.scaling != task.scaling:
        rescale(module, task.scaling, student.scaling)
    return module


def frozen(module: nn.Module) -> nn.Module:
    """The module, in evaluation mode and without gradients from here on."""
    return module.eval().requires_grad_(False)


def rescale(module: nn.Module, given: Scaling, wanted: Scaling) -> None:
    """Have a network that is given input scaled one way see it scaled as it was trained.

    By a hook, so that its layers keep their names.
    """
    mean, std = (torch.tensor([getattr(s, key) for s in (given, wanted)]) for key in ("mean", "std"))
    factor, offset = (std[0] / std[1])[:, None, None], ((mean[0] - mean[1]) / std[1])[:, None, None]
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor.to(inputs[0]) + offset.to(inputs[0]),))


class TeacherEnsemble(nn.Module):
    """Several teachers as one: the logarithm of the mean of their probabilities, weighed as ``votes`` says.

    Weights by agreement need labels, which a judge does not give: these teachers count the same here.
    """

    def __init__(self, teachers: Sequence[nn.Module], weighting: str = "uniform") -> None:
        super().__init__()
        self.members, self.weighting = nn.ModuleList(teachers), weighting

    def forward(self, x: Tensor) -> Tensor:
        seen = [Outputs(member(x), {}) for member in self.members]
        nobodys = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        weights = teacher_weights(seen, nobodys, "uniform" if self.weighting == "agreement" else self.weighting)
        answers = torch.stack([one.logits for one in seen])
        return (answers.log_softmax(-1) + weights.log()[..., None]).logsumexp(0)


def rank(
    task: Task, config: DistillConfig, teachers: Sequence[Teacher], temperature: float
) -> list[dict[str, float | int | str]]:
    """The teachers from the most promising one down, with what speaks for and against each.

    Measured on the validation images. Accuracy comes first, as far as they can tell: who is within two standard
    errors of the most accurate is as good as that. Among those their places decide, by the mean: of accuracy (more is
    better), calibration error (less), the entropy of soft labels at the temperature, in nats (more tells more), and
    the gap in capacity |log(parameters / the student's)| (less: Mirzadeh et al., 2020). The others follow by
    accuracy. That is a rule of thumb without fitted weights, not a law.
    """
    own = sum(p.numel() for p in fresh(task, config, config.student).parameters())
    rows: list[dict[str, float | int | str]] = []
    for teacher in teachers:
        logits = loop.predict(teacher.module, task.validation.pixels, task.scaling)
        soft = (logits.double() / temperature).log_softmax(-1)
        parameters = sum(p.numel() for p in teacher.module.parameters())
        rows.append(
            {
                "teacher": teacher.name,
                "origin": teacher.origin,
                "unseen_validation": teacher.unseen_validation,
                "accuracy": loop.score(logits, task.validation.labels)[0],
                "ece": quality.ece(logits, task.validation.labels),
                "entropy": -(soft.exp() * soft).sum(-1).mean().item(),
                "parameters": parameters,
                "gap": abs(float(torch.tensor(parameters / own).log())),
            }
        )
    best = max(float(row["accuracy"]) for row in rows)
    error = (2 * max(best * (1 - best), 1 / len(task.validation)) / len(task.validation)) ** 0.5
    for row in rows:
        row["is_competitive"] = float(row["accuracy"]) >= best - 2 * error
    good = [row for row in rows if row["is_competitive"]]
    for key, sign in (("accuracy", -1), ("ece", 1), ("entropy", -1), ("gap", 1)):
        for row in good:
            row[f"{key}_rank"] = 1 + sum(sign * float(other[key]) < sign * float(row[key]) for other in good)
    for row in good:
        row["mean_rank"] = sum(int(row[f"{key}_rank"]) for key in ("accuracy", "ece", "entropy", "gap")) / 4

    def order(row: dict[str, float | int | str]) -> tuple[bool, float, float]:
        return (
            not row["is_competitive"],
            float(row["mean_rank"]) if row["is_competitive"] else 0.0,
            -float(row["accuracy"]),
        )

    return sorted(rows, key=order)
