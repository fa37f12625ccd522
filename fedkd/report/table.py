"""The methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.measure import bytes_to, common_accuracy
from fedkd.report.text import percent, seconds, size

if TYPE_CHECKING:
    from fedkd.measure import Row

Curves = Mapping[tuple[str, int], Sequence["Row"]]  # (algorithm, seed) -> the rows of its rounds


def side_by_side(runs: Sequence[Row], curves: Curves) -> Table:
    """A row for each method: means over seeds, with the standard deviation where there are several."""
    common = common_accuracy(list(curves.values()))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for title in ("test acc", "last 5", "teacher", "clients", "up", "down", "time"):
        table.add_column(title, justify="right")
    table.add_column("bytes to common" if common is None else f"bytes to {percent(common)}", justify="right")
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        spent = [None if common is None else bytes_to(common, curves[name, run["seed"]]) for run in mine]
        reached = [value for value in spent if value is not None]
        table.add_row(
            name if mine[0]["deploys"] == "student" else f"{name} (own models)",
            *(_spread([run[key] for run in mine]) for key in ("test_accuracy", "test_accuracy_last5")),
            *(_spread([run[key] for run in mine]) for key in ("teacher_accuracy", "client_accuracy")),
            *(size(fmean(run[key] for run in mine)) for key in ("bytes_up", "bytes_down")),
            seconds(fmean(run["seconds"] for run in mine)),
            size(fmean(reached)) if len(reached) == len(mine) else "–",
        )
    return table


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ±{100 * stdev(known):.1f}" if len(known) > 1 else ""
    return f"{percent(fmean(known))}{spread}"
