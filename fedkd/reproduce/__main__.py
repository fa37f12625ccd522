"""``python -m fedkd.reproduce``: a table of a paper, run with its settings, beside its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fedkd.core import cli, run_directory, runtime
from fedkd.core.errors import RunError, UsageError, unknown
from fedkd.evaluation.report.screen import Screen
from fedkd.evaluation.report.table import Grid
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
    markdown: Annotated[bool, Parameter(help="Write the table as Markdown.", negative=())] = False,
) -> None:
    """Run a published table with the settings of its paper, and print our numbers beside the published ones.

    Without a name, list the tables. Runs that are there are not repeated, and interrupted ones go on where they were.
    """
    if not name:
        Screen(cli.Console()).show(listing(device).rich())
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
            _run(paper.command, cell, seed, cell.run(folder, seed))
    measured = [(cell, [measure(paper, cell, cell.run(folder, seed)) for seed in range(count)]) for cell in cells]
    grid = table(paper, measured, scale)
    print(f"{grid.markdown()}\n") if markdown else Screen(cli.Console()).show(grid.rich())


def _run(name: str, cell: Cell, seed: int, out: Path) -> None:
    """Run a cell with a seed to its end, unless it has ended.

    Raises:
        RunError: the run ended with an error, which it has printed, and with this code.

    """
    if has_ended(out):
        return
    if (out / "config.toml").exists() and not (out / "checkpoint").is_dir():  # it was killed before its first round
        run_directory.lock(out)
        shutil.rmtree(out)
        run_directory.unlock(out)
    arguments, scenario = ["--resume", str(out)], out.with_suffix(out.suffix + ".toml")
    if not out.exists():
        run_directory.create(out.parent)
        run_directory.write(scenario, run_directory.toml(replace(cell.config, seed=seed)))
        arguments = [str(scenario), "--out", str(out)]
    print(f"{cell.row}, {cell.column}, seed {seed}:", file=sys.stderr)
    end_with_this = partial(runtime.end_with, os.getpid()) if os.name == "posix" else None  # no run is left behind
    command = [sys.executable, "-m", f"fedkd.{name}", *arguments]
    code = subprocess.run(command, check=False, preexec_fn=end_with_this).returncode
    if code in (130, 143):
        print("fedkd: the same command goes on with this table.", file=sys.stderr)
        raise KeyboardInterrupt
    if code:
        goes_on = "the same command goes on from there" if (out / "checkpoint").is_dir() else "it has said why"
        error = RunError(f"The run of {cell.row}, {cell.column}, seed {seed} ended with code {code}; {goes_on}.")
        error.code = code if code > 0 else RunError.code  # negative: of a signal
        raise error


def has_ended(out: Path) -> bool:
    """Whether a run directory holds a run that is complete."""
    try:
        return bool(json.loads((out / "result.json").read_text(encoding="utf-8"))["status"] == "ok")
    except (OSError, ValueError, KeyError):
        return False


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
        result = json.loads((out / "result.json").read_text(encoding="utf-8")) if ended else {"runs": []}
        network, _, name = cell.key.partition(".")
        accuracies = [run["evaluation"][network][name or "accuracy"] for run in result["runs"]]
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


def listing(device: str) -> Grid:
    """The tables that can be reproduced, with their cost on this machine."""
    rows = []
    for name in papers.names():
        paper = papers.read(name)
        cells = papers.cells_of(paper, {"device": device}, 1.0)
        costs = [(run, papers.images(paper, run)) for run in {cell.run_name: cell.config for cell in cells}.values()]
        hours = sum(speed.hours(*cost) for cost in costs)
        about = f"{paper.title} ({paper.citation})"
        cost = [_count(sum(images for _, images in costs)), f"{hours:.3g} h"]
        rows.append([name, about, str(len(cells)), str(paper.seeds), *cost])
    caption = (
        "python -m fedkd.reproduce NAME; images and time: of clients (or students) in training, all cells, one\n"
        f"seed; time: from {speed.STEPS} plain steps of each network here, one client for each core, or one on a GPU."
    )
    return Grid(["name", "table", "cells", "seeds", "images", "time"], rows, caption)


if __name__ == "__main__":
    cli.run(app)
