"""The models that a run writes at its end: global students, and with ``--save clients`` those of the clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core import run_directory
from fedkd.core.communication.replies import Expected, Failure
from fedkd.core.communication.validation import validate_update
from fedkd.core.tensors import itemsize
from fedkd.training import confusion

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.rounds import Exchange

QUERY = "query.model"  # the kind of message that asks a client for its model


def student_file(out: Path, run: Config, is_first: bool, name: str) -> Path:
    """The first entry with a student has the plain name; the others are named after their run."""
    plain = "student.safetensors" if is_first else run_directory.student_file(run.algorithm, run.seed)
    return out / plain.replace("student", name, 1)


def save_students(
    experiment: Experiment, last: Tensors, best: Tensors, logits: Tensor, file: Callable[[str], Path]
) -> None:
    """Write the last and the best student, and the confusion matrix of the last one by its logits on the test set."""
    experiment.student(last).save(file("student"))
    if best:
        experiment.student(best).save(file("student-best"))
    counts = confusion.matrix(experiment.test.labels, logits.argmax(-1), experiment.setup.classes)
    text = confusion.as_csv(counts, experiment.test.names)
    run_directory.write(file("confusion").with_suffix(".csv"), text)


def expected_model(experiment: Experiment, client: int) -> Expected:
    """What a client's reply to a request for its model holds."""
    shapes = experiment.setup.trainer.weight_shapes(experiment.setup.model_of(client))
    return Expected({name: prod(shape) * itemsize(shape) for name, shape in shapes.items()})


def save_clients(
    experiment: Experiment, exchange: Exchange, clients: Iterable[int], number: int, out: Path
) -> list[Failure]:
    """Write the models of clients as they are after round ``number``; the clients whose model could not be had."""
    setup, run = experiment.setup, experiment.config
    folder = student_file(out, run, False, "clients").with_suffix("")
    folder.mkdir(exist_ok=True)
    expected = {client: expected_model(experiment, client) for client in clients}
    failures = []
    for reply in exchange(QUERY, number, {client: {} for client in expected}, expected):
        model, reason = setup.model_of(reply.client), reply.failure or "an empty reply"
        if reply.update:
            reason = validate_update(replace(reply.update, metrics={}), setup.trainer.weight_shapes(model))
        if not reply.update or reason:
            failures.append(Failure(reply.client, reply.cause, reason))
        else:
            experiment.student(reply.update.tensors, model).save(folder / f"client-{reply.client}.safetensors")
    return failures
