"""A run as a value in Python: its rounds, its table, its models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.compare import reading
from fedkd.core import objects, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import UsageError, unknown
from fedkd.core.report import figure, table
from fedkd.core.report.rows import numbers
from fedkd.core.report.text import percent

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from fedkd.core.report.grid import Grid
    from fedkd.core.report.picture import Picture
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

    def plot(
        self,
        metric: str = "test_accuracy",
        panels: Sequence[figure.Panel] = ("rounds", "bytes"),
        columns: int = 0,
        style: str = "",
    ) -> Picture:
        """A number of each round over rounds, bytes or seconds: a matplotlib figure, which a notebook shows.

        Means over seeds, with their standard deviation as a band. ``columns`` is the width in columns of a paper (0: a
        screen); ``style`` is a style of matplotlib, or a file of rcParams. ``savefig`` writes it.

        Raises:
            UsageError: no round has such a number, or a panel or style is unknown.

        """
        look = figure.Look(tuple(panels), metric, columns, style)
        figure.check(look)
        if metric not in (known := numbers(self._rows)):
            raise UsageError(unknown("metric of rounds", metric, known))
        return figure.of(self._read[1], figure.title(self.config), {}, look)

    def table(self) -> Grid:
        """Methods side by side: means over seeds, with their standard deviation."""
        return table.side_by_side(*self._read)

    def global_model(
        self, algorithm: str = "", seed: int | None = None, model: str | Callable[..., nn.Module] = ""
    ) -> nn.Module:
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
        student = checkpoint.load(self.path / found[0], objects.as_options({"model": model})["model"])
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

    A component is a spec, or an object: ``run(algorithm=DSFL(temperature=0.2), model=[cnn, MyNetwork])``.

    Raises:
        FedkdError: an option is wrong, or what ended the run.

    """
    from fedkd.simulate import simulate

    return Run(simulate(parsed(options)))


def rounds(**options: Any) -> Iterator[Row]:
    """The same round by round: each row of ``rounds.jsonl`` when its round is complete, as a dict.

    The next round is computed when its row is asked for. A loop that is left early leaves a run that can be continued:
    ``rounds(resume=OUT)``. The run is ``load(OUT)``, also during the loop.

    Raises:
        FedkdError: an option is wrong, or what ended the run.

    """
    from fedkd.simulate import rows

    config = parsed(options)
    if config.engine == "ray":
        raise UsageError("Rounds on Ray cannot be followed one by one; use fedkd.run.")
    yield from rows(config)


def parsed(options: Mapping[str, Any]) -> Config:
    """The config of options by name, among them objects; a run that is resumed has its own options besides.

    Raises:
        UsageError: an option is unknown or wrong.

    """
    given = objects.as_options(options)
    if resume := given.get("resume"):
        given = run_directory.resumed(Config, Path(resume), given)
    return Config.parse(given)


def _frame(rows: list[Row]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows)
