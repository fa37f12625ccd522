"""A written file against the student it was written from: the same answers, at what size and in what time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkd.core.errors import RunError
from fedkd.evaluation.report.table import Grid
from fedkd.evaluation.report.text import percent, size
from fedkd.training.loop import CPU_CHUNK

if TYPE_CHECKING:
    from fedkd.data.readers import Images
    from fedkd.export.formats import Format, Run

SLACK = 1e-3  # of the largest logit: how far float arithmetic in another order may lead
BATCHES = (1, 64)
WARM, REPEATS, SECONDS = 3, 200, 3.0  # calls before the clock runs, calls timed at most, for about so long


def logits(run: Run, pixels: Tensor) -> Tensor:
    """What a runtime returns for images [N, P, P, 3], by parts: logits [N, C]."""
    return torch.cat([run(part.contiguous()) for part in torch.split(pixels, CPU_CHUNK)])


def compare(held: Format, ours: Tensor, theirs: Tensor, labels: Tensor) -> dict[str, Any]:
    """The file's logits ``theirs`` [N, C] beside the original's.

    Raises:
        RunError: they are no numbers, or a file of floats is not the same function.

    """
    difference = (theirs - ours).abs().max().item()
    allowed = math.inf if held.calibrated else SLACK * max(1.0, ours.abs().max().item())
    if not difference < allowed:  # nor where it is no number
        raise RunError(
            f"The {held.name} file's logits differ by {difference:.2g} from the original's, so nothing is written; "
            f"{held.runtime} does not compute this model faithfully."
        )
    return {
        "images": len(labels),
        "accuracy": _share(theirs.argmax(-1) == labels),
        "accuracy_original": _share(ours.argmax(-1) == labels),
        "equal_classes": _share(theirs.argmax(-1) == ours.argmax(-1)),
        "logit_difference": difference,
    }


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def latency(runs: Sequence[Run], pixels: Tensor) -> list[dict[str, list[float]]]:
    """For each runtime, milliseconds of a call by batch size: lower quartile, median, upper quartile.

    Runtimes are timed alternately, so that other load on the machine affects all of them.
    """
    timed: list[dict[str, list[float]]] = [{} for _ in runs]
    for batch in BATCHES:
        images = pixels[torch.arange(batch) % len(pixels)].contiguous()
        taken: list[list[float]] = [[] for _ in runs]
        for turn in range(WARM + REPEATS):
            for run, own in zip(runs, taken, strict=True):
                start = time.perf_counter()
                run(images)
                own.append(1000 * (time.perf_counter() - start))
            if turn >= 2 * WARM and sum(map(sum, taken)) > 1000 * SECONDS * len(runs):
                break
        for own, cells in zip(taken, timed, strict=True):
            quartiles = torch.tensor(own[WARM:]).quantile(torch.tensor([0.25, 0.5, 0.75]))
            cells[str(batch)] = [round(value, 4) for value in quartiles.tolist()]
    return timed


def original(file: Path, run: Run, images: Images) -> tuple[dict[str, Any], Tensor]:
    """The entry of the student itself, and its logits [N, C]."""
    answers = logits(run, images.pixels)
    entry = {"file": file.name, "bytes": file.stat().st_size, "accuracy": _share(answers.argmax(-1) == images.labels)}
    return entry, answers


def grid(report: dict[str, Any]) -> Grid:
    """A row for the student and each file: accuracy, agreement, size, time of a call."""
    rows = [_row("PyTorch", report["original"], {})]
    rows += [_row(name, entry, entry.get("check") or {}) for name, entry in report["files"].items()]
    titles = ["", "test acc", "same class", "logits off by", "size", *(f"{batch} at once" for batch in BATCHES)]
    said = "same class, logits off by: against PyTorch; at once: median milliseconds of a call (quartiles), one thread."
    return Grid(titles, rows, said)


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
