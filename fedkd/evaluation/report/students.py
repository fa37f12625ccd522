"""What `evaluation.quality.judge` found, as two tables and a picture: what candidates know, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fedkd.evaluation.report.figure import COLORS, STYLES
from fedkd.evaluation.report.table import Grid
from fedkd.evaluation.report.text import plain, points, size, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALONE, TAUGHT = "alone", "student"  # the candidates that are one student without a teacher, and with one

Judged = Mapping[str, Mapping[str, Any]]  # candidate -> its verdict
Joined = Mapping[str, Mapping[str, Any]]  # candidate -> what `joined` makes of its verdicts

FEWEST = 10  # images in a bin whose accuracy is drawn: that of fewer is chance


def joined(found: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """One judgment for those of several seeds: each number as {"mean", "std"}, all else as in the first.

    Numbers that a seed lacks are left out, as a bin without an image is; with one number std is None.
    """
    return {name: {key: _join([each[name][key] for each in found]) for key in found[0][name]} for name in found[0]}


def _join(values: Sequence[Any]) -> Any:
    first = next((value for value in values if value is not None), None)
    if isinstance(first, Mapping):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_join(column) for column in zip(*values, strict=True)]
    if isinstance(first, str) or first is None:
        return first
    known = [value for value in values if value is not None]
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None}


def gains(found: Sequence[Judged]) -> list[float]:
    """The accuracy that teaching adds in each seed, in [-1, 1]."""
    return [seed[TAUGHT]["accuracy"] - seed[ALONE]["accuracy"] for seed in found]


def knows(found: Joined) -> Grid:
    """A row for each candidate: right, sure, and like its teacher; on clean, corrupted and shifted images."""
    titles = ["model", "test acc", "NLL", "ECE", "agrees", "corrupted", "shifted"]
    rows = [
        [
            name,
            _share(verdict["accuracy"]),
            _plain(verdict["nll"]),
            *(_share(verdict[key]) for key in ("ece", "agreement", "corruption_accuracy", "shifted_accuracy")),
        ]
        for name, verdict in found.items()
    ]
    any_ = next(iter(found.values()))
    images, hard, moved = (f"{any_[key]['mean']:,.0f}" for key in ("images", "corrupted_images", "shifted_images"))
    given = any_["shifted"] == "given"
    said = [
        f"on {images} test images; NLL in nats; ECE: expected calibration error; agrees: with the teacher's class;",
        f"corrupted: mean accuracy over {', '.join(any_['corruptions'])} at all strengths, {hard} images each;",
        f"shifted: {moved} images {'of another set' if given else 'of the test set, rotated and moved'}.",
    ]
    if any_["corruption_accuracy"] is None:
        del said[1]
    return Grid(titles, rows, "\n".join(said))


def side_by_side(runs: Sequence[tuple[str, str, Sequence[Judged]]]) -> Grid:
    """A row for the student alone and for each way to teach it: (loss, teachers, what was judged by seed)."""
    titles = ["loss", "teacher", "test acc", "- alone", "NLL", "ECE", "agrees", "shifted"]
    rows = []
    for title, teacher, name, judged in [
        (ALONE, "–", ALONE, runs[0][2]),
        *((*run[:2], TAUGHT, run[2]) for run in runs),
    ]:
        verdict = joined(judged)[name]
        rows.append(
            [
                title,
                teacher,
                _share(verdict["accuracy"]),
                "–" if name == ALONE else points(gains(judged)),
                _plain(verdict["nll"]),
                _share(verdict["ece"]),
                "–" if name == ALONE else _share(verdict["agreement"]),
                _share(verdict["shifted_accuracy"]),
            ]
        )
    said = (
        f"means over {plain(len(runs[0][2]), 'seed')}; - alone: the difference in points, paired by seed;\n"
        "NLL in nats; ECE: expected calibration error; agrees: with its teacher's class."
    )
    return Grid(titles, rows, said)


def costs(found: Joined) -> Grid:
    """A row for each candidate: what it takes to keep it and to ask it."""
    any_ = next(iter(found.values()))
    batches = list(any_["latency_ms"])
    titles = ["model", "parameters", "multiply-adds", "on disk", *(_images(batch) for batch in batches)]
    rows = [
        [
            name,
            f"{verdict['parameters']['mean']:,.0f}",
            f"{verdict['multiply_adds']['mean'] / 1e6:,.1f} M",
            size(verdict["bytes"] and verdict["bytes"]["mean"]),
            *(_latency(verdict["latency_ms"][batch]) for batch in batches),
        ]
        for name, verdict in found.items()
    ]
    threads = any_["threads"]["mean"]
    where = f"on {threads:.0f} thread{'' if threads == 1 else 's'}" if any_["device"] == "cpu" else any_["device"]
    caption = (
        "multiply-adds: of convolutions and matrix products, for one image;\n"
        f"times: median and quartiles in ms, from pixels to logits, {where}."
    )
    return Grid(titles, rows, caption)


def _share(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else spread(value["mean"], value["std"])


def _plain(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}")


def _images(batch: str) -> str:
    return f"{batch} image{'' if batch == '1' else 's'}"


def _latency(value: Mapping[str, Mapping[str, float]]) -> str:
    times = [value[key]["mean"] for key in ("median", "low", "high")]
    digits = 3 if times[0] < 1 else 2 if times[0] < 10 else 1
    median, low, high = (f"{milliseconds:.{digits}f}" for milliseconds in times)
    return f"{median} ({low}–{high})"


def draw(found: Joined, title: str, out: Path) -> None:
    """Write ``quality.png`` and ``quality.svg``: a panel for each corruption, then how sure is how right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(next(iter(found.values()))["corruptions"])
    columns = (len(kinds) + 1) // 2
    # A fixed salt and no date, so that the same numbers give the same file.
    with plt.rc_context(
        {"svg.hashsalt": "fedkd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, grid = plt.subplots(
            2, columns + 1, figsize=(3.4 * (columns + 1), 6.4), layout="constrained", squeeze=False
        )
        panels = list(grid[:, :columns].flat)
        for axes in panels[1 : len(kinds)]:
            axes.sharey(panels[0])
        for axes, kind in zip(panels, kinds, strict=False):
            _corruption(axes, found, kind)
        for axes in panels[len(kinds) :]:
            axes.set_axis_off()
        _reliability(grid[0, columns], found)
        _confidence(grid[1, columns], found)
        handles, labels = grid[1, columns].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)
        for axes in grid.flat:
            axes.grid(alpha=0.25, linewidth=0.6)
        figure.suptitle(title, fontsize=10)
        figure.savefig(out / "quality.png", dpi=144, metadata={"Software": None})
        figure.savefig(out / "quality.svg", metadata={"Date": None})
        plt.close(figure)


def _look(index: int) -> dict[str, Any]:
    """Color, dashes and marker of a candidate: told apart without color too."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index % len(STYLES)],
        "marker": "os^Dv"[index % 5],
        "markersize": 3.5,
        "linewidth": 1.4,
    }


def _corruption(axes: Axes, found: Joined, kind: str) -> None:
    """Accuracy over strength, from the same images uncorrupted; the band is a standard deviation over seeds."""
    for index, (name, verdict) in enumerate(found.items()):
        points = [("0", verdict["uncorrupted_accuracy"]), *verdict["corruptions"][kind].items()]
        strengths = [int(strength) for strength, _ in points]
        means = [100 * value["mean"] for _, value in points]
        axes.plot(strengths, means, label=name, **_look(index))
        if points[0][1]["std"] is not None:
            reach = [100 * value["std"] for _, value in points]
            low, high = ([m + sign * r for m, r in zip(means, reach, strict=True)] for sign in (-1, 1))
            axes.fill_between(strengths, low, high, color=COLORS[index % len(COLORS)], alpha=0.15, linewidth=0)
    axes.set(xlabel="strength", ylabel="accuracy (%)")
    axes.set_title(kind, fontsize=9)
    axes.set_xticks(strengths)


def _reliability(axes: Axes, found: Joined) -> None:
    """Accuracy over confidence; on the diagonal they are equal."""
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1)
    for index, (name, verdict) in enumerate(found.items()):
        share, confidence, accuracy = (verdict["reliability"][key] for key in ("share", "confidence", "accuracy"))
        points = [
            (100 * sure["mean"], 100 * right["mean"])
            for part, sure, right in zip(share, confidence, accuracy, strict=True)
            if part["mean"] * verdict["images"]["mean"] >= FEWEST
        ]
        axes.plot(*zip(*points, strict=True), label=name, **_look(index))
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 102), ylim=(0, 102))
    axes.set_title("reliability, clean images", fontsize=9)


def _confidence(axes: Axes, found: Joined) -> None:
    """How many images fall into each bin of confidence."""
    for index, (name, verdict) in enumerate(found.items()):
        heights = [100 * part["mean"] for part in verdict["reliability"]["share"]]
        middles = [100 * (place + 0.5) / len(heights) for place in range(len(heights))]
        axes.plot(middles, heights, label=name, **_look(index))
    axes.set(xlabel="confidence (%)", ylabel="images (%)", xlim=(0, 102))
    axes.set_ylim(bottom=0)
    axes.set_title("confidence, clean images", fontsize=9)
