"""``python -m fedkd.distill``: distillation from any teacher to any student."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core import notes, quotes, run_directory, specs
from fedkd.core.errors import DataError, FedkdError, PluginError, UsageError
from fedkd.data import sources
from fedkd.distill import teacher_names
from fedkd.training import models, schedules
from fedkd.training.terms import BornAgain, Term

if TYPE_CHECKING:
    from fedkd.distill.config import DistillConfig


def distill(config: DistillConfig) -> Path:
    """Distill a student from one teacher or several, or from itself.

    The same student is also trained without a teacher (the baseline), and all are evaluated on the same images.
    Components are named by specs, as in fedkd.simulate.
    """
    terms = check(config)  # before torch is imported, so that a mistake is reported within a second
    is_new, config = not config.resume, run_directory.begin(config, config.student)
    out = Path(config.out)
    from fedkd.distill import runner

    try:
        runner.run(config, terms)
    except (FedkdError, KeyboardInterrupt, SystemExit) as error:
        run_directory.ended(out, error, "distill", "epochs.jsonl", is_new)
        raise
    finally:
        run_directory.unlock(out)
    return out


def check(config: DistillConfig, given: Collection[str] = ()) -> list[Term]:
    """The terms of the loss. All names are resolved here, before heavy imports; notices name ``given`` without effect.

    Raises:
        UsageError, DataError, PluginError: an option cannot be used; the first one found is reported.

    """
    terms = [specs.call("distillation", text) for text in quotes.split(config.loss)]
    for text, term in zip(quotes.split(config.loss), terms, strict=True):
        if not isinstance(term, Term):
            raise PluginError(f"--loss {text} is not a subclass of fedkd.training.terms.Term.")
    if not terms:
        raise UsageError("--loss is empty; the default is logits.")
    named = teacher_names.named(config)
    _check_combination(config, terms, named)
    for text in named:
        if not teacher_names.is_path(text):
            models.check(text)
        elif not Path(text).expanduser().exists():
            raise DataError(
                f"--teacher {text}: no such run or file; a path with a space or a comma stands in double quotes."
            )
    schedules.factor(config.schedule, 0, 1)
    models.check(config.student)
    for dataset in {config.dataset, config.shifted} - {"auto", ""}:
        sources.named(dataset)
    _say_unused(config, terms, named, {*given, *config.changed()})
    return terms


def _say_unused(config: DistillConfig, terms: list[Term], named: list[str], options: Collection[str]) -> None:
    """Print a notice for each of these options that has no effect."""
    are_files = [teacher_names.is_path(text) or models.pretrained(text)[1] is not None for text in named]
    trains = not config.teachers_from and any(term.needs_teacher for term in terms) and not (named and all(are_files))
    if "teacher_epochs" in options and not trains:
        notes.say_unused("teacher_epochs", "a run that trains no teacher")
    if "teacher_weighting" in options and len(named) < 2:
        notes.say_unused("teacher_weighting", "a run with fewer than two teachers")


def _check_combination(config: DistillConfig, terms: list[Term], named: list[str]) -> None:
    """Refuse teachers and losses that exclude each other."""
    needs_teacher = any(term.needs_teacher for term in terms)
    if any(isinstance(term, BornAgain) for term in terms) and len(terms) > 1:
        raise UsageError(
            "--loss self cannot be combined with other losses; its weights are options: self:weight=0.5,hard=0.5."
        )
    if named and config.teachers_from:
        raise UsageError("--teacher and --teachers-from exclude each other; put all students into one directory.")
    if (named or config.teachers_from) and not needs_teacher:
        raise UsageError(f"--loss {config.loss} uses no teacher; remove the teacher, or add a loss such as logits.")
    if config.teachers_from and not config.validation:
        raise UsageError("--teachers-from ranks teachers on validation images; --validation must be at least 1.")
    if config.teachers_from:
        teacher_names.candidates(Path(config.teachers_from), config.out)
