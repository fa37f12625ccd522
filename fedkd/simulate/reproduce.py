"""``python -m fedkd.simulate.reproduce``: a table of a paper, run with its settings, beside its numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fedkd.core import cli, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import RunError, UsageError, unknown
from fedkd.core.options import from_file, underscored
from fedkd.evaluation.report.screen import Screen
from fedkd.evaluation.report.table import Grid

PAPERS = Path(__file__).parents[2] / "simulations" / "papers"

app = cli.new("python -m fedkd.simulate.reproduce")


class Side(BaseModel):
    """A row or a column of a table: its title, and the options of fedkd.simulate that make it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    options: dict[str, Any] = {}


class PaperRow(Side):
    """A row with its published accuracies in percent, one for each column, and their spread, if it was published."""

    published: list[float | None]
    spread: list[float | None] = []


class Paper(BaseModel):
    """A scenario file of a published table, in ``simulations/papers``.

    ``seeds`` is the number of runs of each cell, with seeds from 0; ``samples`` are the private training samples of all
    clients; ``accuracy`` says which one of a run was published.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    citation: str
    differs: list[str]
    accuracy: Literal["last", "best"]
    tolerance: float
    samples: int
    seeds: int
    options: dict[str, Any]
    columns: list[Side]
    rows: list[PaperRow]

    @model_validator(mode="after")
    def _is_rectangular(self) -> Paper:
        for row in self.rows:
            if {len(row.published), len(row.spread) or len(self.columns)} != {len(self.columns)}:
                raise ValueError(f"the row {row.name} has not one number for each column")
        return self


@dataclass(frozen=True)
class Cell:
    """A number of a table, and the runs that give ours; ``options`` are those of fedkd.simulate."""

    row: str
    column: str
    published: float
    spread: float | None
    options: dict[str, Any]

    def run(self, folder: Path, seed: int) -> Path:
        """The run directory of a seed, in the folder of its table."""
        name = re.sub(r"[^a-z0-9.]+", "-", f"{self.row}-{self.column}".lower()).strip("-")
        return folder / f"{name}-seed{seed}"


@app.default
def reproduce(
    name: Annotated[
        str, Parameter(help="A table, as listed without a name; or a scenario file of your own, ./mine.toml.")
    ] = "",
    *,
    scale: Annotated[
        float, Parameter(help="Share of the rounds: a try that is not comparable.", validator=Number(gt=0, lte=1))
    ] = 1.0,
    seeds: Annotated[int, Parameter(help="Runs of each cell; the paper's number if 0.", validator=Number(gte=0))] = 0,
    row: Annotated[tuple[str, ...], Parameter(help="Only these rows.", consume_multiple=True, negative=())] = (),
    column: Annotated[tuple[str, ...], Parameter(help="Only these columns.", consume_multiple=True, negative=())] = (),
    out: Annotated[Path, Parameter(help="The folder of all runs.")] = Path("runs/papers"),
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N.")] = "auto",
    show: Annotated[bool, Parameter(help="Print what is there already, and run nothing.", negative=())] = False,
    markdown: Annotated[bool, Parameter(help="Write the table as Markdown.", negative=())] = False,
) -> None:
    """Run a published table with the settings of its paper, and print our numbers beside the published ones.

    Without a name, list the tables. Runs that are there are not repeated, and interrupted ones go on where they were.
    """
    if not name:
        _list()
        return
    paper = read(name)
    cells = [
        cell
        for cell in cells_of(paper, {"device": device}, scale)
        if cell.row in (row or [cell.row]) and cell.column in (column or [cell.column])
    ]
    count = seeds or paper.seeds
    for kind, given, known in (("row", row, paper.rows), ("column", column, paper.columns)):
        for each in given:
            if each not in (names := [side.name for side in known]):
                raise UsageError(unknown(kind, each, names))
    folder = out / (Path(name).stem if scale == 1 else f"{Path(name).stem}-{scale:g}")
    for seed in () if show else range(count):
        for cell in cells:
            _run(cell, seed, cell.run(folder, seed))
    grid = table(paper, [(cell, [curve(cell.run(folder, seed)) for seed in range(count)]) for cell in cells], scale)
    print(f"{grid.markdown()}\n") if markdown else Screen(cli.Console()).show(grid.rich())


def read(name: str) -> Paper:
    """The scenario file of a table.

    Raises:
        UsageError: there is no such table, or the file does not say what it must.

    """
    path = Path(name) if name.endswith(".toml") else PAPERS / f"{name}.toml"
    if path.parent == PAPERS and not path.exists():
        known = sorted(file.stem for file in PAPERS.glob("*.toml"))
        if not known:
            raise UsageError(f"{PAPERS} is not there: clone the repository, or name a scenario file, ./mine.toml.")
        raise UsageError(unknown("table", name, known))
    try:
        return Paper.model_validate(from_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "table"
        raise UsageError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from error


def cells_of(paper: Paper, changes: dict[str, Any], scale: float) -> list[Cell]:
    """The cells of a table that have a published number, row by row.

    Raises:
        UsageError: fedkd.simulate does not know an option or a value.

    """
    cells = []
    for row in paper.rows:
        for place, column in enumerate(paper.columns):
            if (published := row.published[place]) is None:
                continue
            options = underscored({**paper.options, **column.options, **row.options, **changes})
            options["rounds"] = max(1, round(options["rounds"] * scale))
            options["evaluate_every"] = options["rounds"]  # clients and teacher; the student is evaluated in each round
            Config.parse(options)
            cells.append(Cell(row.name, column.name, published, row.spread[place] if row.spread else None, options))
    return cells


def images(paper: Paper, cell: Cell) -> float:
    """The images on which clients train in a run of a cell."""
    config = Config.parse(cell.options)
    return config.rounds * config.participation * paper.samples * config.local_epochs


def _run(cell: Cell, seed: int, out: Path) -> None:
    """Run a cell with a seed to its end, unless it has ended.

    Raises:
        RunError: the run ended with an error, which it has printed.

    """
    if _has_ended(out):
        return
    arguments, scenario = ["--resume", str(out)], out.with_suffix(out.suffix + ".toml")
    if not (out / "config.toml").exists():
        run_directory.create(out.parent)
        run_directory.write(scenario, run_directory.toml(Config.parse({**cell.options, "seed": seed})))
        arguments = [str(scenario), "--out", str(out)]
    print(f"{cell.row}, {cell.column}, seed {seed}:", file=sys.stderr)
    code = subprocess.run([sys.executable, "-m", "fedkd.simulate", *arguments], check=False).returncode
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise RunError(f"The run in {out} ended with code {code}; the same command goes on from there.")


def _has_ended(out: Path) -> bool:
    try:
        return bool(json.loads((out / "result.json").read_text(encoding="utf-8"))["status"] == "ok")
    except (OSError, ValueError, KeyError):
        return False


def curve(out: Path) -> list[float]:
    """The test accuracy in percent after each round of a run, as far as there are any."""
    file = out / "rounds.jsonl"
    return [100 * row["test_accuracy"] for row in run_directory.rows(file)] if file.exists() else []


def table(paper: Paper, cells: Sequence[tuple[Cell, Sequence[list[float]]]], scale: float) -> Grid:
    """Ours beside the published numbers, from the curves of all seeds; whether the difference is tolerated."""
    rows = []
    for cell, curves in cells:
        started = [each for each in curves if each]
        found = [each[-1] if paper.accuracy == "last" else max(each) for each in started]
        difference = fmean(found) - cell.published if found else None
        has_ended = bool(started) and all(len(each) == cell.options["rounds"] for each in started)
        is_comparable = difference is not None and has_ended and scale == 1
        rows.append(
            [
                cell.row,
                cell.column,
                f"{cell.published:.2f}" + (f" ± {cell.spread:.2f}" if cell.spread is not None else ""),
                _mean(found),
                "–" if difference is None else f"{difference:+.2f}",
                ("yes" if abs(difference or 0) <= paper.tolerance else "no") if is_comparable else "–",
                f"{len(started)} of {len(curves)}",
                f"{min(map(len, started), default=0)} of {cell.options['rounds']}",
                _millions(images(paper, cell)),
            ]
        )
    which = "of the last round" if paper.accuracy == "last" else "the largest of all rounds, as the paper reports it"
    about = f"{paper.title} ({paper.citation}). Test accuracy in percent, {which}; over seeds, with standard deviation."
    notes = [f"At scale {scale:g} of the rounds: not comparable with the published numbers."] if scale < 1 else []
    notes += [f"Differs: {each}." for each in paper.differs]
    within = f"within {paper.tolerance:g}"
    titles = ["row", "column", "published", "ours", "difference", within, "seeds", "rounds", "images of a seed"]
    return Grid(titles, rows, "\n".join([about, *notes]))


def _mean(found: Sequence[float]) -> str:
    if not found:
        return "–"
    return f"{fmean(found):.2f}" + (f" ± {stdev(found):.2f}" if len(found) > 1 else "")


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def _list() -> None:
    """Print the tables that can be reproduced."""
    rows = []
    for path in sorted(PAPERS.glob("*.toml")):
        paper = read(path.stem)
        cells = cells_of(paper, {}, 1.0)
        cost = sum(images(paper, cell) for cell in cells) * paper.seeds
        about = f"{paper.title} ({paper.citation})"
        rows.append([path.stem, about, str(len(cells)), str(paper.seeds), _millions(cost)])
    caption = "python -m fedkd.simulate.reproduce NAME; cost: images on which clients train, of all cells and seeds."
    Screen(cli.Console()).show(Grid(["name", "table", "cells", "seeds", "cost"], rows, caption).rich())


if __name__ == "__main__":
    cli.run(app)
