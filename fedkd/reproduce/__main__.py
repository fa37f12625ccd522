"""``python -m fedkd.reproduce``: a table of a paper, run with its settings, beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedkd.core import cli, run_directory
from fedkd.core.errors import UsageError, unknown
from fedkd.core.report.grid import Format, Grid
from fedkd.core.report.screen import Screen
from fedkd.core.subruns import complete, has_ended
from fedkd.reproduce import papers, speed
from fedkd.reproduce.papers import Cell, Paper

app = cli.new("reproduce")


@app.default
def reproduce(
    name: Annotated[
        str, Parameter(help="A table, as listed without a name; or a scenario file of your own, ./mine.toml.")
    ] = "",
    *,
    scale: Annotated[
        float,
        Parameter(help="Share of the rounds or epochs: a try that is not comparable.", validator=Number(gt=0, lte=1)),
    ] = 1.0,
    seeds: Annotated[int, Parameter(help="Runs of each cell; the paper's number if 0.", validator=Number(gte=0))] = 0,
    row: Annotated[tuple[str, ...], Parameter(help="Only these rows.", consume_multiple=True, negative=())] = (),
    column: Annotated[tuple[str, ...], Parameter(help="Only these columns.", consume_multiple=True, negative=())] = (),
    out: Annotated[Path, Parameter(help="The folder of all runs.")] = Path("runs/papers"),
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N.")] = "auto",
    show: Annotated[bool, Parameter(help="Print what is there already, and run nothing.", negative=())] = False,
    form: Annotated[Format, Parameter(name="--format", help="terminal, markdown or latex.")] = "terminal",
) -> None:
    """Run a published table with the settings of its paper, and print our numbers beside the published ones.

    Without a name, list the tables. Runs that are there are not repeated, and interrupted ones go on where they were.
    """
    if not name:
        Screen(cli.Console()).show(listing(device))
        return
    paper = papers.read(name)
    count = seeds or paper.seeds
    for kind, given, known in (("row", row, paper.rows), ("column", column, paper.columns)):
        for each in given:
            if each not in (names := [side.name for side in known]):
                raise UsageError(unknown(kind, each, names))
    cells = [
        cell
        for cell in papers.cells_of(paper, {"device": device}, scale)
        if cell.row in (row or [cell.row]) and cell.column in (column or [cell.column])
    ]
    folder = out / (Path(name).stem if scale == 1 else f"{Path(name).stem}-{scale:g}")
    for seed in () if show else range(count):
        for cell in cells:
            about = f"{cell.row}, {cell.column}, seed {seed}"
            complete(paper.command, replace(cell.config, seed=seed), cell.run(folder, seed), about)
    measured = [(cell, [measure(paper, cell, cell.run(folder, seed)) for seed in range(count)]) for cell in cells]
    grid = table(paper, measured, scale)
    Screen(cli.Console()).show(grid, form)


@dataclass(frozen=True)
class Measured:
    """What a run of a cell gave so far: its number, in the unit of the table, and its rounds or epochs."""

    number: float | None
    length: int
    has_ended: bool


def measure(paper: Paper, cell: Cell, out: Path) -> Measured:
    """The number of a run."""
    file = out / ("epochs.jsonl" if paper.command == "distill" else "rounds.jsonl")
    rows, ended = run_directory.rows(file) if file.exists() else [], has_ended(out)
    if paper.command == "distill":
        network, _, name = cell.key.partition(".")
        with run_directory.readable(out / "result.json"):
            runs = run_directory.read_json(out / "result.json")["runs"] if ended else []
            accuracies = [run["evaluation"][network][name or "accuracy"] for run in runs]
        length = max((row["number"] for row in rows if row["network"].startswith("student")), default=0)
    else:
        accuracies, length = [row[cell.key] for row in rows if row[cell.key] is not None], len(rows)
    if paper.measure == "rounds":
        reached = bool(rows) and ended and (rows[-1][cell.key] or 0) >= (cell.target or 0)
        return Measured(float(length) if reached else None, length, ended)
    if not accuracies:
        return Measured(None, length, ended)
    return Measured(100 * (accuracies[-1] if paper.measure == "last" else max(accuracies)), length, ended)


def table(paper: Paper, cells: Sequence[tuple[Cell, Sequence[Measured]]], scale: float) -> Grid:
    """Ours beside the published numbers, from the runs of all seeds; whether the difference is tolerated."""
    rows, form = [], "g" if paper.measure == "rounds" else ".2f"
    for cell, runs in cells:
        started = [run for run in runs if run.length]
        ended = [run for run in runs if run.has_ended]
        found = [run.number for run in started if run.number is not None]
        difference = fmean(found) - cell.published if found else None
        is_comparable = difference is not None and len(ended) == len(found) == len(started) and scale == 1
        not_reached = paper.measure == "rounds" and len(ended) > len(found)
        rows.append(
            [
                cell.row,
                cell.column,
                f"{cell.published:{form}}" + (f" ± {cell.spread:{form}}" if cell.spread is not None else ""),
                f"not reached ({len(found)} of {len(ended)})" if not_reached else _mean(found),
                "–" if difference is None else f"{difference:+.2f}",
                ("yes" if abs(difference or 0) <= paper.tolerance else "no") if is_comparable else "–",
                f"{len(ended)} of {len(runs)}",
                f"{min((run.length for run in started), default=0)} of {cell.length}",
                _count(papers.images(paper, cell.config)),
            ]
        )
    length = "epochs" if paper.command == "distill" else "rounds"
    title = f"{paper.title} ({paper.citation}). {_ABOUT[paper.measure]}; over seeds, with standard deviation."
    notes = [f"{row.name}: {row.key}." for row in paper.rows if row.key]
    if scale < 1:
        notes.append(f"At scale {scale:g} of the {length}: not comparable with the published numbers.")
    notes += [f"Differs: {each}." for each in paper.differs]
    within = f"within {paper.tolerance:g}"
    titles = ["row", "column", "published", "ours", "difference", within, "seeds", length, "images of a seed"]
    return Grid(titles, rows, "\n".join([title, *notes]))


_ABOUT = {
    "last": "Test accuracy in percent, at the end",
    "best": "Test accuracy in percent, the largest of all rounds, as the paper reports it",
    "rounds": "Rounds to the test accuracy in the column's title",
}


def _mean(found: Sequence[float]) -> str:
    if not found:
        return "–"
    return f"{fmean(found):.2f}" + (f" ± {stdev(found):.2f}" if len(found) > 1 else "")


def _count(images: float) -> str:
    return f"{images / 1e6:.2f} M" if images >= 1e5 else f"{images:,.0f}"


def duration(hours: float) -> str:
    """A time in minutes, in hours, or above 48 hours in days."""
    if hours > 48:
        return f"{hours / 24:,.0f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{ceil(60 * hours)} min"


def listing(device: str) -> Grid:
    """The tables that can be reproduced, with their cost on this machine."""
    rows = []
    for name in papers.names():
        paper = papers.read(name)
        cells = papers.cells_of(paper, {"device": device}, 1.0)
        costs = [(run, papers.images(paper, run)) for run in {cell.run_name: cell.config for cell in cells}.values()]
        hours = sum(speed.hours(*cost) for cost in costs)
        about = f"{paper.title} ({paper.citation})"
        cost = [_count(sum(images for _, images in costs)), duration(hours)]
        rows.append([name, about, str(len(cells)), str(paper.seeds), *cost])
    caption = (
        "python -m fedkd.reproduce NAME; images and time: of clients (or students) in training, all cells, one\n"
        f"seed; time: from {speed.STEPS} plain steps of each network here, one client for each core, or one on a GPU."
    )
    return Grid(["name", "table", "cells", "seeds", "images", "time"], rows, caption)


if __name__ == "__main__":
    cli.run(app)
