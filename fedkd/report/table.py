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
    table.add_column("method", overflow="fold")
    to_common = "to common" if common is None else f"to {percent(common)}"
    for title in ("test acc", "last 5", "teacher", "clients", "bytes", "time", to_common):
        table.add_column(title, justify="right", no_wrap=True)
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        spent = [None if common is None else bytes_to(common, curves[name, run["seed"]]) for run in mine]
        reached = [value for value in spent if value is not None]
        table.add_row(
            name if mine[0]["deploys"] == "student" else f"{name}*",
            *(_spread([run[key] for run in mine]) for key in ("test_accuracy", "test_accuracy_last5")),
            *(_spread([run[key] for run in mine]) for key in ("teacher_accuracy", "client_accuracy")),
            size(fmean(run["bytes_up"] + run["bytes_down"] for run in mine)),
            seconds(fmean(run["seconds"] for run in mine)),
            size(fmean(reached)) if len(reached) == len(mine) else "–",
        )
    own = (
        " *: no global student; the test accuracy is that of the clients' own models."
        if any(run["deploys"] == "clients" for run in runs)
        else ""
    )
    table.caption = f"bytes: arrays up and down, all clients and rounds; to …: until that accuracy.{own}"
    table.caption_justify = "left"
    return table


def ledger(runs: Sequence[Row]) -> Table:
    """What each method sent in all, from the numbers themselves to what was framed, and what no coder can beat."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    for title in ("raw", "entropy", "coded", "framed", "equal at"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        sizes = [fmean(run[key] for run in mine) for key in ("raw_bytes", "entropy_bytes", "coded_bytes")]
        framed = fmean(run["bytes_up"] + run["bytes_down"] for run in mine)
        equal = [run["break_even"] for run in mine if run["break_even"] is not None]
        table.add_row(name, *map(size, sizes), size(framed), f"{int(fmean(equal)):,}" if equal else "–")
    table.caption = (
        "raw: as float32; entropy: of the symbols sent, floats as coded; framed: as serialized;\n"
        "equal at: proxy images a round at which answers cost as much as the student's weights."
    )
    table.caption_justify = "left"
    return table


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ±{100 * stdev(known):.1f}" if len(known) > 1 else ""
    return f"{percent(fmean(known))}{spread}"
