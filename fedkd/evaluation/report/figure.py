"""The learning curves as a figure: over rounds, and over bytes."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedkd.core import run_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedkd.evaluation.report.table import Curves

# Okabe and Ito's colors, which color-blind readers can distinguish; teacher and clients have that of their method.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")  # of further methods, after the last color


def draw(curves: Curves, title: str, out: Path) -> None:
    """Write ``curve.png`` and ``curve.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    # A fixed salt and no date, so that the same numbers give the same file.
    with plt.rc_context(
        {"svg.hashsalt": "fedkd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (over_rounds, over_bytes) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
        names = list(dict.fromkeys(name for name, _ in curves))
        for index, name in enumerate(names):
            color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
            _curve(over_rounds, curves, name, color, style, len(names) <= 3)
            _against_bytes(over_bytes, curves, name, color, style)
        bands = " (bands: range over seeds)" if len(curves) > len(names) else ""
        over_rounds.set(xlabel=f"round{bands}", ylabel="test accuracy (%)")
        over_rounds.xaxis.get_major_locator().set_params(integer=True)
        # Methods differ by orders of magnitude here.
        over_bytes.set(xlabel="bytes in both directions, all clients (MB)", xscale="log")
        over_bytes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        over_bytes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        over_bytes.xaxis.set_minor_formatter(NullFormatter())
        handles, labels = over_rounds.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(6, max(3, len(labels) // 4)),
            frameon=False,
            fontsize=8,
        )
        for axes in (over_rounds, over_bytes):
            axes.grid(alpha=0.25, linewidth=0.6)
        figure.suptitle(title, fontsize=10)
        save(figure, out, "curve")
        plt.close(figure)


def save(figure: Figure, out: Path, name: str) -> None:
    """Write ``NAME.png`` and ``NAME.svg``, without dates, so that the same numbers give the same files."""
    with run_directory.atomic(out / f"{name}.png") as part:
        figure.savefig(part, dpi=144, metadata={"Software": None})
    with run_directory.atomic(out / f"{name}.svg") as part:
        figure.savefig(part, metadata={"Date": None})


def _means(curves: Curves, name: str, key: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Rounds, the mean over seeds, and each seed's own curve, where all seeds have a value: some may end early."""
    runs = [rows for (algorithm, _), rows in curves.items() if algorithm == name]
    whole = [rows for rows in zip(*runs, strict=False) if all(row[key] is not None for row in rows)]
    return (
        [rows[0]["round"] for rows in whole],
        [100 * fmean(r[key] for r in rows) for rows in whole],
        [[100 * rows[i][key] for rows in whole] for i in range(len(runs))],
    )


def _curve(axes: Axes, curves: Curves, name: str, color: str, style: str, with_others: bool) -> None:
    rounds, mean, each = _means(curves, name, "test_accuracy")
    axes.plot(rounds, mean, style, color=color, marker="o", markersize=3, label=name)
    if len(each) > 1:
        low, high = (list(map(pick, zip(*each, strict=True))) for pick in (min, max))
        axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
    if not with_others:
        return
    styles: dict[str, Any] = {"teacher_accuracy": ("--", "teacher")}
    if _means(curves, name, "test_loss")[0]:  # without a student the test accuracy is that of the clients
        styles["client_accuracy"] = (":", "mean client")
    for key, (line, label) in styles.items():
        rounds, other, _ = _means(curves, name, key)
        if len(other) > 1 and other != mean:  # a single point is no line
            axes.plot(rounds, other, line, color=color, linewidth=1, label=f"{name}: {label}")


def _against_bytes(axes: Axes, curves: Curves, name: str, color: str, style: str) -> None:
    runs = [rows for (algorithm, _), rows in curves.items() if algorithm == name]
    for rows in runs:
        spent = list(accumulate(row["uplink_serialized_bytes"] + row["downlink_serialized_bytes"] for row in rows))
        points = [
            (b / 1e6, 100 * r["test_accuracy"])
            for b, r in zip(spent, rows, strict=True)
            if r["test_accuracy"] is not None
        ]
        if points and spent[-1]:
            axes.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3)
