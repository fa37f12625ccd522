"""The results of `evaluation.quality.evaluate` as two tables and a figure: predictive quality and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fedkd.core.notes import plain
from fedkd.core.report.figure import COLORS, STYLES, save, sized
from fedkd.core.report.grid import Grid
from fedkd.core.report.text import points, size, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of two candidates: the student trained without a teacher, and with one.
BASELINE, STUDENT = "baseline", "student"

Evaluation = Mapping[str, Mapping[str, Any]]  # candidate -> its results
Joined = Mapping[str, Mapping[str, Any]]  # candidate -> its results, combined over seeds by `joined`

MIN_IMAGES = 10  # in a bin; the accuracy of bins with fewer images is too noisy to be drawn


def joined(results: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """The results of several seeds, combined: numbers as {"mean", "std"}, all else as in the first seed.

    Missing values, such as the accuracy of an empty bin, are left out. With one value std is None.
    """
    return {
        name: {key: _join([each[name][key] for each in results]) for key in results[0][name]} for name in results[0]
    }


def _join(values: Sequence[Any]) -> Any:
    first = next((value for value in values if value is not None), None)
    if isinstance(first, Mapping):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_join(column) for column in zip(*values, strict=True)]
    if isinstance(first, str) or first is None:
        return first
    numbers = [value for value in values if value is not None]
    return {"mean": fmean(numbers), "std": stdev(numbers) if len(numbers) > 1 else None}


def gains(results: Sequence[Evaluation]) -> list[float]:
    """The difference in accuracy between the distilled student and the baseline for each seed, in [-1, 1]."""
    return [seed[STUDENT]["accuracy"] - seed[BASELINE]["accuracy"] for seed in results]


def quality_table(results: Joined) -> Grid:
    """A row for each candidate: accuracy, calibration and agreement on clean, corrupted and shifted images."""
    titles = ["model", "test acc", "NLL", "ECE", "agreement", "corrupted", "shifted"]
    rows = [
        [
            name,
            _share(result["accuracy"]),
            _plain(result["nll"]),
            *(_share(result[key]) for key in ("ece", "agreement", "corruption_accuracy", "shifted_accuracy")),
        ]
        for name, result in results.items()
    ]
    first = next(iter(results.values()))
    images, corrupted, shifted = (
        f"{first[key]['mean']:,.0f}" for key in ("images", "corrupted_images", "shifted_images")
    )
    origin = "another data set" if first["shifted"] == "given" else "the test set, rotated and translated"
    caption = [
        f"on {images} test images; NLL in nats; ECE: expected calibration error; agreement: with the teacher's class;",
        f"corrupted: mean accuracy over {', '.join(first['corruptions'])} at all strengths, {corrupted} images each;",
        f"shifted: {shifted} images of {origin}.",
    ]
    if first["corruption_accuracy"] is None:
        del caption[1]
    return Grid(titles, rows, "\n".join(caption))


def side_by_side(runs: Sequence[tuple[str, str, Sequence[Evaluation]]]) -> Grid:
    """A row for the baseline and for each run (loss, teachers, results by seed)."""
    titles = ["loss", "teacher", "test acc", f"Δ {BASELINE}", "NLL", "ECE", "agreement", "shifted"]
    rows = []
    for title, teacher, name, evaluations in [
        (BASELINE, "–", BASELINE, runs[0][2]),
        *((*run[:2], STUDENT, run[2]) for run in runs),
    ]:
        result = joined(evaluations)[name]
        rows.append(
            [
                title,
                teacher,
                _share(result["accuracy"]),
                "–" if name == BASELINE else points(gains(evaluations)),
                _plain(result["nll"]),
                _share(result["ece"]),
                "–" if name == BASELINE else _share(result["agreement"]),
                _share(result["shifted_accuracy"]),
            ]
        )
    caption = (
        f"means over {plain(len(runs[0][2]), 'seed')}; Δ {BASELINE}: difference in percentage points, paired by seed;\n"
        "NLL in nats; ECE: expected calibration error; agreement: with its teacher's class."
    )
    return Grid(titles, rows, caption)


def epochs_table(results: Joined) -> Grid:
    """Test accuracy after the last epoch, and after that with the best validation accuracy."""
    titles = ["model", "last epoch", "best epoch", "val acc", "test at best"]
    rows = [
        [
            name,
            _share(result["accuracy"]),
            f"{result['best_epoch']['mean']:.1f}".removesuffix(".0") if result["best_epoch"] else "–",
            *(_share(result[key]) for key in ("best_validation_accuracy", "best_test_accuracy")),
        ]
        for name, result in results.items()
        if "best_epoch" in result
    ]
    caption = (
        "best epoch: the first one with the highest validation accuracy; –: no validation, or not trained here.\n"
        "The files have the weights of the last epoch."
    )
    return Grid(titles, rows, caption)


def largest(runs: Sequence[tuple[str, str, Sequence[Evaluation]]]) -> Grid:
    """Test accuracy after the last epoch, and the largest of all epochs, as some published tables report it."""
    rows = []
    for title, teacher, name, evaluations in [
        (BASELINE, "–", BASELINE, runs[0][2]),
        *((*run[:2], STUDENT, run[2]) for run in runs),
    ]:
        result = joined(evaluations)[name]
        rows.append([title, teacher, _share(result["accuracy"]), _share(result.get("largest_test_accuracy"))])
    caption = "largest: of all epochs, chosen on the test set, so it is too high; –: not trained here."
    return Grid(["loss", "teacher", "last epoch", "largest on test"], rows, caption)


def cost_table(results: Joined) -> Grid:
    """A row for each candidate: parameters, multiply-adds, bytes on disk and latency."""
    first = next(iter(results.values()))
    batches = list(first["latency_ms"])
    titles = ["model", "parameters", "multiply-adds", "on disk", *(_images(batch) for batch in batches)]
    rows = [
        [
            name,
            f"{result['parameters']['mean']:,.0f}",
            f"{result['multiply_adds']['mean'] / 1e6:,.1f} M",
            size(result["bytes"] and result["bytes"]["mean"]),
            *(_latency(result["latency_ms"][batch]) for batch in batches),
        ]
        for name, result in results.items()
    ]
    threads = first["threads"]["mean"]
    device = f"on {threads:.0f} thread{'' if threads == 1 else 's'}" if first["device"] == "cpu" else first["device"]
    caption = (
        "multiply-adds: convolutions and matrix products for one image;\n"
        f"latency: median and quartiles in ms, from pixels to logits, {device}."
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


def draw(results: Joined, title: str, out: Path) -> None:
    """Write ``quality.png``, ``.svg`` and ``.pdf``: a panel for each corruption, then reliability and confidence."""
    kinds = list(next(iter(results.values()))["corruptions"])
    columns = (len(kinds) + 1) // 2
    with sized((3.4 * (columns + 1), 6.4)) as figure:
        grid = figure.subplots(2, columns + 1, squeeze=False)
        panels = list(grid[:, :columns].flat)
        for axes in panels[1 : len(kinds)]:
            axes.sharey(panels[0])
        for axes, kind in zip(panels, kinds, strict=False):
            _corruption(axes, results, kind)
        for axes in panels[len(kinds) :]:
            axes.set_axis_off()
        _reliability(grid[0, columns], results)
        _confidence(grid[1, columns], results)
        handles, labels = grid[1, columns].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)
        for axes in grid.flat:
            axes.grid(alpha=0.25, linewidth=0.6)
        figure.suptitle(title, fontsize=10)
        save(figure, out, "quality")


def _style(index: int) -> dict[str, Any]:
    """Color, line style and marker of a candidate, which is distinguishable without color too."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index % len(STYLES)],
        "marker": "os^Dv"[index % 5],
        "markersize": 3.5,
        "linewidth": 1.4,
    }


def _corruption(axes: Axes, results: Joined, kind: str) -> None:
    """Accuracy over strength, where 0 is uncorrupted; the band is the standard deviation over seeds."""
    for index, (name, result) in enumerate(results.items()):
        points = [("0", result["uncorrupted_accuracy"]), *result["corruptions"][kind].items()]
        strengths = [int(strength) for strength, _ in points]
        means = [100 * value["mean"] for _, value in points]
        axes.plot(strengths, means, label=name, **_style(index))
        if points[0][1]["std"] is not None:
            deviations = [100 * value["std"] for _, value in points]
            low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(strengths, low, high, color=COLORS[index % len(COLORS)], alpha=0.15, linewidth=0)
    axes.set(xlabel="strength", ylabel="accuracy (%)")
    axes.set_title(kind, fontsize=9)
    axes.set_xticks(strengths)


def _reliability(axes: Axes, results: Joined) -> None:
    """The reliability diagram: accuracy over confidence; a calibrated model lies on the diagonal."""
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1)
    for index, (name, result) in enumerate(results.items()):
        share, confidence, accuracy = (result["reliability"][key] for key in ("share", "confidence", "accuracy"))
        points = [
            (100 * mean_confidence["mean"], 100 * mean_accuracy["mean"])
            for part, mean_confidence, mean_accuracy in zip(share, confidence, accuracy, strict=True)
            if part["mean"] * result["images"]["mean"] >= MIN_IMAGES
        ]
        axes.plot(*zip(*points, strict=True), label=name, **_style(index))
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 102), ylim=(0, 102))
    axes.set_title("reliability, clean images", fontsize=9)


def _confidence(axes: Axes, results: Joined) -> None:
    """The share of images in each bin of confidence."""
    for index, (name, result) in enumerate(results.items()):
        heights = [100 * part["mean"] for part in result["reliability"]["share"]]
        middles = [100 * (index + 0.5) / len(heights) for index in range(len(heights))]
        axes.plot(middles, heights, label=name, **_style(index))
    axes.set(xlabel="confidence (%)", ylabel="images (%)", xlim=(0, 102))
    axes.set_ylim(bottom=0)
    axes.set_title("confidence, clean images", fontsize=9)
