"""What the page of a run is made of: the files of its directory."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core import run_directory
from fedkd.simulate.evaluation import metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedkd.core.report.rows import Row
    from fedkd.core.report.table import Curves

    Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """A run directory without its rounds.

    ``counts`` are the samples of each client and class [clients, classes] by seed, ``names`` those of the classes, if
    they are known.
    """

    path: Path
    result: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[int, Counts] = field(default_factory=dict)
    names: Sequence[str] = ()
    errors: Sequence[Row] = ()


@dataclass(frozen=True)
class Setting:
    """Runs of one setting: summaries, and rounds by method and seed."""

    title: str
    runs: Sequence[Row]
    curves: Curves
    records: Sequence[Record]


def record(path: Path, result: Mapping[str, Any]) -> Record:
    """What lies in a run directory; files that are not there are left out."""
    return Record(
        path,
        result,
        _toml(path / "config.toml"),
        run_directory.read_json(path / "env.json") if (path / "env.json").exists() else {},
        _counts(path / "partition.npz"),
        _names(path),
        run_directory.rows(path / "errors.jsonl") if (path / "errors.jsonl").exists() else (),
    )


def summaries(finished: Sequence[Row], curves: Curves) -> list[Row]:
    """The summaries of the methods and seeds that have a round, in the order of ``result.json``, then of the rounds.

    One that has not finished has the totals of its rounds, and the key ``unfinished``.
    """
    done = {(run["algorithm"], run["seed"]) for run in finished}
    about = {key: {"algorithm": key[0], "seed": key[1], "unfinished": True} for key in curves}
    return [*finished, *({**about[key], **metrics.totals(rows)} for key, rows in curves.items() if key not in done)]


def _toml(path: Path) -> dict[str, Any]:
    with run_directory.readable(path):
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _counts(path: Path) -> dict[int, Counts]:
    """The counts of each seed; none of clients that bring their own data."""
    if not path.exists():
        return {}
    import numpy as np

    with run_directory.readable(path), np.load(path) as arrays:
        seeds = [name for name in arrays if name.endswith("_counts")]
        found = {int(name.removeprefix("seed").removesuffix("_counts")): arrays[name] for name in seeds}
    return {seed: counts for seed, counts in found.items() if counts.size and counts.sum(1).all()}


def _names(path: Path) -> list[str]:
    """The names of the classes, from a confusion matrix."""
    file = next(iter(sorted(path.glob("confusion*.csv"))), None)
    if file is None:
        return []
    with file.open(encoding="utf-8", newline="") as text:
        return next(csv.reader(text), [])[1:]
