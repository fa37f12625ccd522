"""The learning curves as a figure: a number of each round over rounds, bytes or seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from fedkd.core import run_directory
from fedkd.core.errors import UsageError, unknown
from fedkd.core.report.table import NO_LABELS, Curves, Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedkd.core.report.picture import Picture
    from fedkd.core.report.rows import Row

# Okabe and Ito's colors, which color-blind readers can distinguish; teacher and clients have that of their method.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")  # of further methods, after the last color
WITHOUT_DATE: Mapping[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
FORMATS = tuple(WITHOUT_DATE)
# Text is text in the files, and numbers give the same file: a fixed salt, no date.
RC: Any = {"svg.hashsalt": "fedkd", "svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 9}
RC |= {"axes.spines.top": False, "axes.spines.right": False}

Panel = Literal["rounds", "bytes", "seconds"]
AXES = {
    "rounds": "round",
    "bytes": "bytes, both directions (MB)",
    "seconds": "training time (s)",
}


@dataclass(frozen=True)
class Look:
    """What a figure shows, and how: its panels, its number, its width in columns of a paper, a style of matplotlib.

    Without columns it is as wide as a screen. ``style`` is a file of rcParams, or a name that matplotlib knows.
    """

    panels: Sequence[Panel] = ("rounds", "bytes")
    metric: str = "test_accuracy"
    columns: int = 0
    style: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches; a column of a paper is 3.3 inches wide."""
        if not self.columns:
            return 5.0 * len(self.panels), 4.6
        if self.columns == 1:  # panels one below the other
            return 3.3, 2.4 * len(self.panels) + 0.5
        return 6.9, 5.2 / len(self.panels) + 0.5


def draw(
    curves: Curves, title: str, out: Path, name: str = "curve", labels: Labels = NO_LABELS, look: Look | None = None
) -> None:
    """Write NAME.png, .svg and .pdf of these curves."""
    save(of(curves, title, labels, look or Look()), out, name)


def of(curves: Curves, title: str, labels: Labels, look: Look) -> Picture:
    """The figure of these curves: means over seeds, and the standard deviation as a band.

    A curve ends with the first of its seeds. ``labels`` are names for methods, instead of their specs.
    """
    with sized(look.size, look.style) as figure:
        shape = (len(look.panels), 1) if look.columns == 1 else (1, len(look.panels))
        panels = figure.subplots(*shape, sharey=True, squeeze=False)
        names = list(dict.fromkeys(name for name, _ in curves))
        for axes, panel in zip(panels.flat, look.panels, strict=True):
            for index, method in enumerate(names):
                runs = [rows for (algorithm, _), rows in curves.items() if algorithm == method]
                with_others = len(names) <= 3 and panel == "rounds" and look.metric == "test_accuracy"
                _curves(axes, runs, panel, look.metric, labels.get(method, method), index, with_others)
            _label(axes, panel)
        for axes in panels[:, 0]:
            axes.set_ylabel(look.metric.replace("_", " ") + " (%)" * ("accuracy" in look.metric))
        drawn = [line for axes in panels.flat for line in axes.get_lines() if len(line.get_xdata())]
        handles = {str(line.get_label()): line for line in drawn}  # one of each, if it is drawn at all
        most = {0: min(6, max(3, len(handles) // 4)), 1: 2}.get(look.columns, 4)
        bands = "bands: standard deviation over seeds" if len(curves) > len(names) else None
        about = {"title": bands, "title_fontsize": 8, "fontsize": 8}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=most, frameon=False, **about)
        if not look.columns:  # a figure of a paper has a caption
            figure.suptitle(title, fontsize=10)
        return figure


def title(options: Mapping[str, Any], by: Collection[str] = (), setting: str = "") -> str:
    """The setting of a run, from its options with dashes in their names; those of ``by`` are named by ``setting``."""
    shown = {key: str(options[key]) for key in ("dataset", "clients", "partitioner", "model") if key not in by}
    if "clients" in shown:
        shown["clients"] += " clients"
    return ", ".join([*shown.values(), *([setting] if setting else [])])


def check(look: Look) -> None:
    """Whether there is a panel, and matplotlib knows the style.

    Raises:
        UsageError: there is none, or one is unknown, or matplotlib does not know the style.

    """
    if not look.panels:
        raise UsageError("--panel needs a value: rounds, bytes or seconds.")
    for panel in look.panels:
        if panel not in AXES:
            raise UsageError(unknown("panel", panel, AXES))
    if look.style:
        with sized(look.size, look.style):
            pass


@contextmanager
def sized(size: tuple[float, float], style: str = "") -> Iterator[Picture]:
    """A figure with the rcParams of all figures, and those of a style on top. No window is opened."""
    import matplotlib
    from matplotlib import style as styles

    from fedkd.core.report.picture import Picture

    with matplotlib.rc_context(RC):
        if style:
            try:
                styles.use(style)
            except (OSError, ValueError) as error:
                raise UsageError(f"--style {style} is neither a file of rcParams nor a style of matplotlib.") from error
        yield Picture(figsize=size, layout="constrained")


def save(figure: Picture, out: Path, name: str) -> None:
    """Write NAME.png, .svg and .pdf, without dates, so that the same numbers give the same files."""
    for kind in FORMATS:
        with run_directory.atomic(out / f"{name}.{kind}") as part:
            figure.savefig(part, dpi=144, metadata=WITHOUT_DATE[kind])


def _curves(
    axes: Axes, runs: Sequence[Sequence[Row]], panel: str, metric: str, name: str, index: int, with_others: bool
) -> None:
    """The curve of a method, with its band; and those of its teacher and its clients, if they differ."""
    color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
    places, mean, std = means(runs, panel, metric)
    if panel == "bytes" and not any(places):
        places = mean = std = []  # nothing is sent
    axes.plot(places, mean, style, color=color, marker="o", markersize=3, label=name)
    if len(runs) > 1 and places:  # an empty band would have no place on a logarithmic axis
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    if not with_others:
        return
    others = {"teacher_accuracy": ("--", "teacher")}
    if means(runs, panel, "test_loss")[0]:  # without a student the test accuracy is that of the clients
        others["client_accuracy"] = (":", "mean client")
    for key, (line, label) in others.items():
        rounds, other, _ = means(runs, panel, key)
        if len(other) > 1 and other != mean:  # a single point is no line
            axes.plot(rounds, other, line, color=color, linewidth=1, label=f"{name}: {label}")


def means(runs: Sequence[Sequence[Row]], panel: str, metric: str) -> tuple[list[float], list[float], list[float]]:
    """Places (rounds, MB or s), means and standard deviations over seeds, where all have a value: some may end early.

    Accuracies are in percent.
    """
    keys = {"bytes": ("uplink_serialized_bytes", "downlink_serialized_bytes"), "seconds": ("training_seconds",)}
    unit, scale = {"bytes": 1e-6}.get(panel, 1.0), 100 if "accuracy" in metric else 1
    spent = [list(accumulate(sum(row[key] for key in keys.get(panel, ())) for row in rows)) for rows in runs]
    places, averages, stds = [], [], []
    for rows, each in zip(zip(*runs, strict=False), zip(*spent, strict=False), strict=True):
        values = [row.get(metric) for row in rows]
        known = [scale * value for value in values if value is not None]
        if len(known) == len(values):
            places.append(float(rows[0]["round"]) if panel == "rounds" else unit * fmean(each))
            averages.append(fmean(known))
            stds.append(stdev(known) if len(known) > 1 else 0.0)
    return places, averages, stds


def _label(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel(AXES[panel])
    axes.grid(alpha=0.25, linewidth=0.6)
    if panel == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel == "bytes":  # methods differ by orders of magnitude here
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
