"""The figures of a benchmark as tables and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.evaluation.report.text import size


def best(stack: Mapping[str, Any]) -> float:
    """Seconds of the fastest round: what noise on the machine leaves."""
    return min(_rounds(stack))


def typical(stack: Mapping[str, Any]) -> float:
    """Seconds of the median round."""
    return median(_rounds(stack))


def beside(stack: Mapping[str, Any]) -> float:
    """Seconds of a process beyond its rounds at their usual speed: start, warming up in round one, end."""
    others = [
        run["rest"] + sum(run["rounds"]) - len(run["rounds"]) * median(warm(run["rounds"])) for run in stack["runs"]
    ]
    return float(median(others))


def _rounds(stack: Mapping[str, Any]) -> list[float]:
    return [seconds for run in stack["runs"] for seconds in warm(run["rounds"])]


def warm(rounds: Sequence[float]) -> Sequence[float]:
    """All rounds but the first, in which some stacks start their processes."""
    return rounds[1:]


def table(part: str, found: Mapping[str, Any]) -> Table:
    """One part's table."""
    held = found[part]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=TITLES[part], title_justify="left")
    table.add_column("", no_wrap=True)
    columns = COLUMNS[part]
    for title in ("best round", "median", "beside rounds", "memory", "bytes a round", *columns):
        table.add_column(title, justify="right", no_wrap=True)
    for name, stack in held.items():
        always = (
            _seconds(best(stack)),
            _seconds(typical(stack)),
            f"{beside(stack):.1f} s",
            _memory(stack["megabytes"]),
            size(stack["bytes"]),
        )
        table.add_row(name, *always, *(columns[title](stack, found, held) for title in columns))
    return table


def _memory(megabytes: float | None) -> str:
    return "–" if megabytes is None else f"{megabytes:,.0f} MB"


def _beyond(stack: Mapping[str, Any], found: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    return _memory(stack["beyond"])


def _ratio(stack: Mapping[str, Any], found: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """Its best round by that of the stack it is held against."""
    if stack["against"] not in held:
        return "–"
    return f"{best(stack) / best(held[stack['against']]):.2f} x {stack['against']}"


def _speed(stack: Mapping[str, Any], found: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    return f"{found['work']['clients'] * found['work']['images'] / best(stack):,.0f}"


def _per_message(stack: Mapping[str, Any], found: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    return f"{1e6 * best(stack) / stack['messages']:.0f} us"


def _first_step(stack: Mapping[str, Any], found: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """Seconds to the first client's step, and how many of these are not the import of PyTorch."""
    begun = median(run["begun"] for run in stack["runs"])
    return f"{begun:.1f} s" + (f" ({begun - found['import_torch']:+.1f})" if "import_torch" in found else "")


TITLES = {
    "fedavg": "FedAvg",
    "ensemble": "Ensemble distillation, 1,000 proxy images",
    "idle": "Rounds in which clients do nothing",
    "many": "20 participants with 2 images each, of more and more clients",
}
COLUMNS: dict[str, dict[str, Callable[..., str]]] = {
    "fedavg": {"images/s": _speed, "against": _ratio},
    "ensemble": {"against": _ratio},
    "idle": {"a message": _per_message, "first step (beyond import torch)": _first_step},
    "many": {"beyond images on disk": _beyond, "against": _ratio},
}


def _seconds(value: float) -> str:
    return f"{1000 * value:.2f} ms" if value < 0.1 else f"{value:.2f} s"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Images a second of every stack, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    held = found["fedavg"]
    images = found["work"]["clients"] * found["work"]["images"]
    speeds = {name: images / best(stack) for name, stack in held.items()}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8, 0.45 * len(speeds) + 1.2), layout="constrained")
        colors = ["#0072B2" if name.startswith("fedkd") else "#999999" for name in speeds]
        bars = axes.barh(list(speeds), list(speeds.values()), color=colors)
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="images trained a second (FedAvg, best round)", xlim=(0, 1.12 * max(speeds.values())))
        figure.savefig(path, dpi=144, metadata={"Software": None})
        plt.close(figure)
