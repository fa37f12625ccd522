"""``python -m fedkd.compare``: runs that were played apart, in one table."""

from __future__ import annotations

import json
import tomllib
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

    Runs must be of one setting, but for methods, seeds, codecs and where they were computed.
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


#: What two runs may differ in: which methods and seeds, how it is sent, and where it is computed.
FREE = {"algorithm", "compare", "seed", "seeds", "out", "json", "device", "engine", "workers", "client-timeout"}
FREE |= {"ray-address", "client-cpus", "client-gpus", "data-dir", "evaluate-every", "up", "down"}


def read(paths: tuple[Path, ...]) -> tuple[list[Row], dict[tuple[str, int], list[Row]]]:
    """The summaries of what the runs finished, and their rounds by method and seed.

    Raises:
        UsageError: one is no run that finished anything, or they differ in more than `FREE` or in
            who holds which rows, or play the same twice.

    """
    finished: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    settings: dict[str, object] = {}
    partitions: dict[int, str] = {}
    for path in paths:
        try:
            result = json.loads((path / "result.json").read_text(encoding="utf-8"))
            rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
            config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
            played = {(run["algorithm"], run["seed"]): run for run in result["runs"]}
            own = {key: [row for row in rounds if (row["algorithm"], row["seed"]) == key] for key in played}
            config["dataset"] = result["dataset"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is not the directory of a run that has ended ({type(error).__name__})."
            ) from error
        if not played or not all(own.values()):
            raise UsageError(f"{path} finished no method; it was interrupted or failed.")
        held = {key: value for key, value in config.items() if key not in FREE}
        different = sorted(key for key in held if settings.setdefault(key, held[key]) != held[key])
        if different:
            raise UsageError(f"{path} and {paths[0]} differ in {', '.join(different)}; compare runs of one setting.")
        for (_, seed), run in played.items():
            if partitions.setdefault(seed, run.get("partition_sha256")) != run.get("partition_sha256"):
                raise UsageError(f"{path} deals other images than {paths[0]} with seed {seed}; they cannot be paired.")
        if twice := sorted(played.keys() & curves.keys()):
            raise UsageError(f"{twice[0][0]} with seed {twice[0][1]} is in two of the runs; name one of them.")
        finished += played.values()
        curves |= own
    return finished, curves


if __name__ == "__main__":
    cli.run(app)
