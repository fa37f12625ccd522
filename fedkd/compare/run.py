"""A run as a value in Python: its rounds, its table, its models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.compare import reading
from fedkd.core import run_directory
from fedkd.core.config import Config
from fedkd.core.errors import UsageError, unknown
from fedkd.core.report import table
from fedkd.core.report.text import percent

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from fedkd.core.report.grid import Grid
    from fedkd.core.report.rows import Row


@dataclass(frozen=True, repr=False)
class Run:
    """A run of fedkd.simulate in its directory, as far as it is done."""

    path: Path

    @cached_property
    def _files(self) -> reading.RunFiles:
        files = reading.read_run(self.path)
        if files.is_distilled:
            raise UsageError(f"{self.path} is a run of fedkd.distill; fedkd.load reads runs of fedkd.simulate.")
        return files

    @cached_property
    def _read(self) -> tuple[list[Row], dict[tuple[str, int], list[Row]]]:
        return reading.simulated([self._files])

    @property
    def _rows(self) -> list[Row]:
        return [row for rows in self._read[1].values() for row in rows]

    @property
    def config(self) -> dict[str, Any]:
        """The options of the run."""
        return self._files.config

    @property
    def summaries(self) -> pandas.DataFrame:
        """A row for each method and seed, with the keys of ``result.json``."""
        return _frame(self._read[0])

    @property
    def rounds(self) -> pandas.DataFrame:
        """A row for each round of each method and seed, with the keys of ``rounds.jsonl``."""
        return _frame(self._rows)

    @property
    def clients(self) -> pandas.DataFrame:
        """A row for each client in each round in which clients were evaluated."""
        keys = ("algorithm", "seed", "round")
        return _frame(
            [{**{key: row[key] for key in keys}, **client} for row in self._rows for client in row["clients"] or ()]
        )

    def table(self) -> Grid:
        """Methods side by side: means over seeds, with their standard deviation."""
        return table.side_by_side(*self._read)

    def global_model(self, algorithm: str = "", seed: int | None = None, model: str = "") -> nn.Module:
        """The global student after the last round, by default the first: pixels uint8 [N, P, P, 3] -> logits [N, C].

        It is in evaluation mode, and includes the scaling of its input. Code that its file names is not imported: a
        user-defined model must be given by ``model``.

        Raises:
            UsageError: the run has no such method or seed, or this method has no global student.
            DataError: the file of the student is missing or damaged, or has a user-defined model.

        """
        from fedkd.export.with_scaling import WithScaling
        from fedkd.training.models import checkpoint

        files = run_directory.student_files(self._read[0])
        if algorithm and algorithm not in (names := list(dict.fromkeys(name for name, _ in files))):
            raise UsageError(unknown("method with a global student", algorithm, names))
        found = [file for (name, number), file in files.items() if algorithm in ("", name) and seed in (None, number)]
        if not found:
            raise UsageError(f"{self.path} has no global student" + f" with seed {seed}" * (seed is not None) + ".")
        student = checkpoint.load(self.path / found[0], model)
        return WithScaling(student.module(), student.scaling).eval()

    def __repr__(self) -> str:
        try:
            methods = [
                f"{run['algorithm']} {percent(run['test_accuracy'])} (seed {run['seed']})" for run in self._read[0]
            ]
        except UsageError as error:
            return f"Run({str(self.path)!r}: {error})"
        return f"Run({str(self.path)!r}: {', '.join(methods[:4])}{', ...' * (len(methods) > 4)})"


def load(path: Path | str) -> Run:
    """The run in a directory.

    Raises:
        UsageError: it is not the directory of a run of fedkd.simulate, or has no round yet.

    """
    run = Run(Path(path))
    run._read  # noqa: B018  a mistake shows here
    return run


def run(**options: Any) -> Run:
    """Simulate with these options, those of `Config`, and read the result: ``run(clients=20, algorithm="dsfl")``.

    Raises:
        FedkdError: an option is wrong, or what ended the run.

    """
    from fedkd.simulate import simulate

    return Run(simulate(Config.parse(options)))


def _frame(rows: list[Row]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows)
