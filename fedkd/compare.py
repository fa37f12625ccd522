"""``python -m fedkd.compare``: runs that were played apart, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from fedkd import cli
from fedkd.errors import UsageError
from fedkd.report import figure, table
from fedkd.report.screen import Screen

if TYPE_CHECKING:
    from fedkd.measure import Row

app = cli.new("python -m fedkd.compare")


@app.default
def compare(
    *runs: Annotated[Path, Parameter(help="Run directories, of different methods or seeds.")],
    markdown: Annotated[bool, Parameter(help="Write the tables as Markdown.", negative=())] = False,
    out: Annotated[Path | None, Parameter(help="A directory for curve.png and curve.svg.")] = None,
) -> None:
    """Put methods and seeds of several runs into one table, as if one run had played them all.

    Runs of one seed must have dealt the same rows to the same clients, else a comparison means nothing.
    """
    if not runs:
        raise UsageError("Name the directories of one run or more.")
    finished, curves = read(runs)
    for grid in (table.side_by_side(finished, curves), table.ledger(finished)):
        if markdown:
            print(f"{grid.markdown()}\n")
        else:
            Screen(Console()).show(grid.rich())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        figure.draw(curves, ", ".join(path.name for path in runs), out)


def read(paths: tuple[Path, ...]) -> tuple[list[Row], dict[tuple[str, int], list[Row]]]:
    """The summaries of what the runs finished, and their rounds by method and seed.

    Raises:
        UsageError: one is no run, or they are not of the same partition, or play the same twice.

    """
    finished: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    partitions: dict[int, str] = {}
    for path in paths:
        try:
            result = json.loads((path / "result.json").read_text(encoding="utf-8"))
            rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is not the directory of a run that has ended: {error}.") from error
        for run in result["runs"]:
            name, seed = run["algorithm"], run["seed"]
            if (name, seed) in curves:
                raise UsageError(f"{name} with seed {seed} is in two of the runs; name one of them.")
            if partitions.setdefault(seed, run["partition_sha256"]) != run["partition_sha256"]:
                raise UsageError(f"{path} dealt other rows for seed {seed} than the runs before it.")
            finished.append(run)
            curves[name, seed] = [row for row in rounds if (row["algorithm"], row["seed"]) == (name, seed)]
    return finished, curves


if __name__ == "__main__":
    cli.run(app)
