"""What a distillation has done: the lines of ``epochs.jsonl``, and a checkpoint of each network and evaluation.

Networks are trained one after the other. The checkpoint of a network that is finished has only its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core import checkpoint, run_directory, tensors
from fedkd.core.errors import DataError, ResumeError
from fedkd.core.report.text import percent, seconds
from fedkd.core.seeds import derive
from fedkd.core.tensors import put, take
from fedkd.distill import train
from fedkd.training import loop

if TYPE_CHECKING:
    from torch import nn

    from fedkd.core.report.screen import Screen
    from fedkd.core.tensors import Tensors
    from fedkd.distill.config import DistillConfig
    from fedkd.distill.task import Task
    from fedkd.distill.train import Epoch
    from fedkd.training.terms import Term


class Progress:
    """Trains networks, shows and records their epochs, and continues after the checkpoints that `restore` found."""

    def __init__(self, config: DistillConfig, screen: Screen) -> None:
        self._config, self._screen = config, screen
        self._rows, self._folder = Path(config.out) / "epochs.jsonl", Path(config.out) / "checkpoint"
        self._found: dict[str, tuple[dict[str, Any], Tensors]] = {}
        self._lines = 0  # of epochs.jsonl

    def restore(self) -> None:
        """Read the checkpoints of the run directory, and drop the lines of epochs that none of them has.

        Raises:
            DataError: a checkpoint is damaged, or lines are missing.
            ResumeError: it was written with other options.

        """
        for folder in sorted(self._folder.glob("*/")):
            if found := checkpoint.read(folder, self._config):
                self._found[folder.name] = found
        self._lines = max((about["lines"] for about, _ in self._found.values()), default=0)
        if not self._lines:
            self._rows.unlink(missing_ok=True)
            return
        rows = run_directory.rows(self._rows) if self._rows.exists() else []
        if len(rows) < self._lines:
            raise DataError(f"{self._rows} lacks epochs that a checkpoint has; start the run again.")
        run_directory.write(self._rows, "".join(map(run_directory.line, rows[: self._lines])))

    def train(
        self,
        name: str,
        module: nn.Module,
        task: Task,
        config: DistillConfig,
        *,
        epochs: int,
        seed: int,
        terms: Sequence[Term] = (),
        teachers: Sequence[nn.Module] = (),
    ) -> None:
        """Train a network in place, from its checkpoint if there is one. ``name`` names it in the run directory.

        Raises:
            ResumeError: it was trained on other data, or with other teachers.
            RunError: training diverged.

        """
        inputs = _inputs(task, teachers)
        about, state = self._restored(name, inputs)
        start = int(about.get("number", 0))
        if start == epochs:
            module.load_state_dict(take("network", state))
            self._screen.print(f"{name:>24}  trained already")
            return
        if start:
            self._screen.print(f"{name:>24}  continued after epoch {start}")
        options = {"epochs": epochs, "seed": seed, "terms": terms, "teachers": teachers, "start": start, "state": state}
        for epoch, state_of in train.train(module, task, config, **options):  # type: ignore[arg-type]
            self._report(name, epoch)
            every = self._config.checkpoint_every
            if epoch.number == epochs:
                self._save(name, epochs, put("network", loop.weights_of(module)), inputs)
            elif every and epoch.number % every == 0:
                self._save(name, epoch.number, state_of(), inputs)

    def is_finished(self, name: str, epochs: int) -> bool:
        """Whether there is a checkpoint of the last epoch of a network."""
        return bool(self._found.get(_place(name), ({}, {}))[0].get("number") == epochs)

    def keep(self, name: str, module: nn.Module, task: Task, epochs: int) -> None:
        """Write the checkpoint of a network from the cache, so that a resumed run has the same one."""
        if not (self._folder / _place(name) / f"state-{epochs}.safetensors").exists():
            self._save(name, epochs, put("network", loop.weights_of(module)), _inputs(task, ()))

    def best(self, name: str) -> dict[str, Any]:
        """The best epoch of a network by validation, and its largest test accuracy; None for one from the cache."""
        rows = [row for row in run_directory.rows(self._rows) if row["network"] == name] if self._lines else []
        best = max((row for row in rows if row["accuracy"] is not None), key=lambda row: row["accuracy"], default={})
        return {
            "best_epoch": best.get("number"),
            "best_validation_accuracy": best.get("accuracy"),
            "best_test_accuracy": best.get("test_accuracy"),
            "largest_test_accuracy": max((row["test_accuracy"] for row in rows), default=None),
        }

    def evaluation(self, seed: int, task: Task, teachers: Sequence[nn.Module]) -> Any:
        """The evaluation of a seed; empty if the seed is not finished."""
        return self._restored(f"evaluation seed{seed}", _inputs(task, teachers))[0].get("evaluation", {})

    def keep_evaluation(self, seed: int, task: Task, teachers: Sequence[nn.Module], evaluation: object) -> None:
        """Write the evaluation of a seed: all of it is finished."""
        self._save(f"evaluation seed{seed}", 0, {}, _inputs(task, teachers), evaluation=evaluation)

    def _restored(self, name: str, inputs: str) -> tuple[dict[str, Any], Tensors]:
        about, state = self._found.get(_place(name), ({"inputs": inputs}, {}))
        if about["inputs"] != inputs:
            raise ResumeError(f"{self._folder} has a {name} of other data or other teachers; start a new run.")
        return about, state

    def _save(self, name: str, number: int, state: Tensors, inputs: str, **more: object) -> None:
        if self._config.checkpoint_every:
            more = {"inputs": inputs, "lines": self._lines, **more}
            checkpoint.write(self._folder / _place(name), number, state, self._config, more)

    def _report(self, name: str, epoch: Epoch) -> None:
        """Append an epoch to ``epochs.jsonl`` and print it."""
        run_directory.append(self._rows, {"network": name, **dataclasses.asdict(epoch)})
        self._lines += 1
        validation = "" if epoch.loss is None else f"validation {percent(epoch.accuracy):>6}  loss {epoch.loss:6.3f}  "
        self._screen.print(f"{name:>24}  epoch {epoch.number:>3}  {validation}{seconds(epoch.seconds):>8}")


def _inputs(task: Task, teachers: Sequence[nn.Module]) -> str:
    """A hash of the training images and of the teachers' weights."""
    digests = [task.digest, *(tensors.digest(loop.weights_of(teacher)) for teacher in teachers)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _place(name: str) -> str:
    """The name of the directory of a checkpoint; different for different networks."""
    words = "".join(c if c.isalnum() else "-" for c in name).strip("-")[:60]
    return f"{words}-{derive(0, name):016x}"
