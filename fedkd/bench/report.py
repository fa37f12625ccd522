"""The results of a benchmark as tables and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.core.report.text import size


def best(stack: Mapping[str, Any]) -> float:
    """Seconds of the fastest round, which has the least noise."""
    return min(_rounds(stack))


def typical(stack: Mapping[str, Any]) -> float:
    """Seconds of the median round."""
    return median(_rounds(stack))


def overhead(stack: Mapping[str, Any]) -> float:
    """Seconds of a process outside its rounds (start, end), plus the excess of the first round over the median."""
    overheads = []
    for run in stack["runs"]:
        rounds = run["rounds"]
        overheads.append(run["seconds_outside_rounds"] + sum(rounds) - len(rounds) * median(warm(rounds)))
    return float(median(overheads))


def _rounds(stack: Mapping[str, Any]) -> list[float]:
    return [seconds for run in stack["runs"] for seconds in warm(run["rounds"])]


def warm(rounds: Sequence[float]) -> Sequence[float]:
    """All rounds except the first, in which some stacks start their processes."""
    return rounds[1:]


def table(part: str, results: Mapping[str, Any]) -> Table:
    """The table of one part."""
    stacks = results[part]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=TITLES[part], title_justify="left")
    table.add_column("", no_wrap=True)
    columns = COLUMNS[part]
    for title in ("best round", "median", "overhead", "memory", "bytes per round", *columns):
        table.add_column(title, justify="right", no_wrap=True)
    for name, stack in stacks.items():
        common = (
            _seconds(best(stack)),
            _seconds(typical(stack)),
            f"{overhead(stack):.1f} s",
            _memory(stack["megabytes"]),
            size(stack["bytes"]),
        )
        table.add_row(name, *common, *(columns[title](stack, results, stacks) for title in columns))
    return table


def _memory(megabytes: float | None) -> str:
    return "–" if megabytes is None else f"{megabytes:,.0f} MB"


def _memory_without_images(stack: Mapping[str, Any], results: Mapping[str, Any], stacks: Mapping[str, Any]) -> str:
    return _memory(stack["megabytes_without_images"])


def _ratio(stack: Mapping[str, Any], results: Mapping[str, Any], stacks: Mapping[str, Any]) -> str:
    """The best round relative to that of the reference stack."""
    if stack["reference"] not in stacks:
        return "–"
    return f"{best(stack) / best(stacks[stack['reference']]):.2f} x {stack['reference']}"


def _speed(stack: Mapping[str, Any], results: Mapping[str, Any], stacks: Mapping[str, Any]) -> str:
    return f"{results['work']['clients'] * results['work']['images'] / best(stack):,.0f}"


def _per_message(stack: Mapping[str, Any], results: Mapping[str, Any], stacks: Mapping[str, Any]) -> str:
    return f"{1e6 * best(stack) / stack['messages']:.0f} us"


def _first_step(stack: Mapping[str, Any], results: Mapping[str, Any], stacks: Mapping[str, Any]) -> str:
    """Seconds until the first client starts, and how many of them are not the import of PyTorch."""
    start = median(run["seconds_to_first_client"] for run in stack["runs"])
    return f"{start:.1f} s" + (f" ({start - results['import_torch']:+.1f})" if "import_torch" in results else "")


TITLES = {
    "fedavg": "FedAvg",
    "ensemble": "Ensemble distillation, 1,000 proxy images",
    "checkpoints": "Checkpoints in ensemble distillation; all of a run's time, divided among its rounds",
    "idle": "Rounds without computation on clients",
    "many": "20 participants with 2 images each, sampled from an increasing number of clients",
    "gpu": "FedAvg on a GPU",
}
COLUMNS: dict[str, dict[str, Callable[..., str]]] = {
    "fedavg": {"images/s": _speed, "relative": _ratio},
    "ensemble": {"relative": _ratio},
    "checkpoints": {"relative": _ratio},
    "idle": {"per message": _per_message, "first client (after import torch)": _first_step},
    "many": {"memory without images on disk": _memory_without_images, "relative": _ratio},
    "gpu": {"images/s": _speed, "relative": _ratio},
}


def _seconds(value: float) -> str:
    return f"{1000 * value:.2f} ms" if value < 0.1 else f"{value:.2f} s"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Images per second of every stack, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stacks = results["fedavg"]
    images = results["work"]["clients"] * results["work"]["images"]
    speeds = {name: images / best(stack) for name, stack in stacks.items()}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8, 0.45 * len(speeds) + 1.2), layout="constrained")
        colors = ["#0072B2" if name.startswith("fedkd") else "#999999" for name in speeds]
        bars = axes.barh(list(speeds), list(speeds.values()), color=colors)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="images trained per second (FedAvg, best round)", xlim=(0, 1.12 * max(speeds.values())))
        figure.savefig(path, dpi=144, metadata={"Software": None})
        plt.close(figure)
