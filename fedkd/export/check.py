"""Comparison of a written file with its student: logits, size and latency."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkd.core.errors import RunError
from fedkd.core.report.grid import Grid
from fedkd.core.report.text import percent, size
from fedkd.training.loop import CPU_CHUNK

if TYPE_CHECKING:
    from fedkd.data.readers import Images
    from fedkd.export.formats import Format, Run

TOLERANCE = 1e-3  # relative to the largest logit: for float arithmetic in another order
BATCHES = (1, 64)
WARM, REPEATS, SECONDS = 3, 200, 3.0  # warm-up calls, timed calls at most, seconds at most


def logits(run: Run, pixels: Tensor) -> Tensor:
    """The logits [N, C] of a runtime for images [N, P, P, 3], computed in chunks."""
    return torch.cat([run(part.contiguous()) for part in torch.split(pixels, CPU_CHUNK)])


def compare(chosen: Format, expected: Tensor, actual: Tensor, labels: Tensor) -> dict[str, Any]:
    """The comparison of a file's logits ``actual`` [N, C] with those of the student.

    Raises:
        RunError: they are not finite, or a float file computes another function.

    """
    difference = (actual - expected).abs().max().item()
    allowed = math.inf if chosen.calibrated else TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference < allowed:  # also refuses NaN
        raise RunError(
            f"The logits of the {chosen.name} file differ by {difference:.2g} from the student's, so nothing is "
            f"written. {chosen.runtime} does not compute this model faithfully."
        )
    return {
        "images": len(labels),
        "accuracy": _share(actual.argmax(-1) == labels),
        "accuracy_original": _share(expected.argmax(-1) == labels),
        "equal_classes": _share(actual.argmax(-1) == expected.argmax(-1)),
        "logit_difference": difference,
    }


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def latency(runs: Sequence[Run], pixels: Tensor) -> list[dict[str, list[float]]]:
    """For each runtime, milliseconds of a call by batch size: lower quartile, median, upper quartile.

    Runtimes are timed alternately, so that other load on the machine affects all of them.
    """
    latencies: list[dict[str, list[float]]] = [{} for _ in runs]
    for batch in BATCHES:
        images = pixels[torch.arange(batch) % len(pixels)].contiguous()
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(WARM + REPEATS):
            for run, measured in zip(runs, times, strict=True):
                start = time.perf_counter()
                run(images)
                measured.append(1000 * (time.perf_counter() - start))
            if repeat >= 2 * WARM and sum(map(sum, times)) > 1000 * SECONDS * len(runs):
                break
        for measured, cells in zip(times, latencies, strict=True):
            quartiles = torch.tensor(measured[WARM:]).quantile(torch.tensor([0.25, 0.5, 0.75]))
            cells[str(batch)] = [round(value, 4) for value in quartiles.tolist()]
    return latencies


def original(file: Path, run: Run, images: Images) -> tuple[dict[str, Any], Tensor]:
    """The entry of the student, and its logits [N, C]."""
    expected = logits(run, images.pixels)
    entry = {"file": file.name, "bytes": file.stat().st_size, "accuracy": _share(expected.argmax(-1) == images.labels)}
    return entry, expected


def grid(report: dict[str, Any]) -> Grid:
    """A row for the student and for each file: accuracy, agreement, size and latency."""
    rows = [_row("PyTorch", report["original"], {})]
    rows += [_row(name, entry, entry.get("check") or {}) for name, entry in report["files"].items()]
    titles = ["", "test acc", "agreement", "max logit diff", "size", *(f"batch {batch}" for batch in BATCHES)]
    caption = "agreement, max logit diff: with PyTorch; batch: median milliseconds of a call (quartiles) on one thread."
    return Grid(titles, rows, caption)


def _row(name: str, entry: dict[str, Any], check: dict[str, Any]) -> list[str]:
    times = entry.get("milliseconds", {})
    return [
        name,
        percent(check.get("accuracy", entry.get("accuracy")), 2),
        percent(check.get("equal_classes"), 2),
        f"{check['logit_difference']:.1e}" if check else "–",
        size(entry["bytes"]),
        *(_time(times.get(str(batch))) for batch in BATCHES),
    ]


def _time(quartiles: list[float] | None) -> str:
    if quartiles is None:
        return "–"
    low, middle, high = quartiles
    return f"{middle:.3g} ({low:.3g}–{high:.3g})"
