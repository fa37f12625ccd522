"""Trackers: where else the rows of ``rounds.jsonl`` go. Each method with each seed is a run of the tracker.

A user-defined tracker is any object with the three methods of `Tracker`. Its constructor is also called to check its
options, so that it opens nothing: `Tracker.start` does. An exception of a tracker never ends a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedkd.core import quotes, specs
from fedkd.core.config import Config
from fedkd.core.errors import PluginError, UsageError
from fedkd.core.run_directory import run_name

if TYPE_CHECKING:
    from fedkd.core.report.rows import Row


@dataclass(frozen=True)
class Entry:
    """One method with one seed. ``identity`` stays the same when it is resumed, after ``rounds`` rounds.

    ``group`` is the name of the run directory ``out``; ``config`` are the options that results depend on.
    """

    name: str
    group: str
    identity: str
    rounds: int
    config: Mapping[str, str | int | float | bool]
    out: Path


@runtime_checkable
class Tracker(Protocol):
    """What a tracker does; the calls for one entry follow each other, entry by entry."""

    def start(self, entry: Entry) -> None:
        """Begin the tracker's run of an entry, or continue it."""

    def log(self, row: Row) -> None:
        """Add a round, with the keys of ``rounds.jsonl``."""

    def end(self, result: Row | None) -> None:
        """End it with the entry's summary in ``result.json``; None if it was interrupted or has failed."""


def entry(run: Config, out: Path, identity: str, rounds: int) -> Entry:
    """The entry of ``run``, the config of one method with one seed."""
    machine = {name.replace("_", "-") for name in Config.MACHINE} | {"compare", "seeds"}
    config = {key: value for key, value in run.run_config().items() if key not in machine}
    return Entry(f"{run.algorithm}, seed {run.seed}", out.absolute().name, identity, rounds, config, out)


def named(config: Config) -> dict[str, Tracker]:
    """The trackers of a config, by their specs.

    Raises:
        UsageError: an unknown name or option, or the library of a tracker is not installed.
        PluginError: a user-defined tracker that cannot be used.

    """
    trackers = {text: specs.call("tracker", text) for text in quotes.split(config.tracker)}
    for text, tracker in trackers.items():
        if not isinstance(tracker, Tracker):
            raise PluginError(f"--tracker {text} lacks one of the methods start(entry), log(row) and end(result).")
    return trackers


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those of an object in it as ``KEY/NAME``; not texts, lists, and what was not measured."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise UsageError(
            f"--tracker {library} needs {library}, which is not installed: pip install 'fedkd[{library}]'."
        )


@dataclass
class TensorBoard:
    """TensorBoard: event files in the run directory, ``tensorboard/METHOD-seedN-HASH``; nothing is sent anywhere."""

    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _require("tensorboard")

    def start(self, entry: Entry) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = entry.out / "tensorboard" / run_name(str(entry.config["algorithm"]), int(entry.config["seed"]))
        purged = entry.rounds + 1 if entry.rounds else None  # TensorBoard drops these rounds of earlier event files
        self._writer = SummaryWriter(str(folder), purge_step=purged)
        self._text("config", entry.config, entry.rounds)

    def log(self, row: Row) -> None:
        for key, value in numbers(row).items():
            if key not in ("seed", "round"):
                self._writer.add_scalar(key, value, row["round"])
        self._writer.flush()

    def end(self, result: Row | None) -> None:
        if result:
            self._text("result", result, result["rounds"])
        self._writer.close()

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        self._writer.add_text(name, f"```\n{json.dumps(dict(values), indent=2)}\n```", step)


#: Seconds: without them, a prompt for a key, or an end without a network, would hold up a run for good.
WANDB_LIMITS = {"login_timeout": 30, "finish_timeout": 300, "finish_timeout_raises": True}


@dataclass
class WandB:
    """Weights & Biases: its client sends numbers and options to its server, or keeps them (``WANDB_MODE=offline``)."""

    project: str = "fedkd"
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _require("wandb")

    def start(self, entry: Entry) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=entry.name,
            group=entry.group,
            id=entry.identity,
            resume="allow",
            config=dict(entry.config),
            dir=str(entry.out),
            reinit="create_new",  # beside a run of the caller's own
            settings=wandb.Settings(console="off", silent=True, **WANDB_LIMITS),
        )

    def log(self, row: Row) -> None:
        self._run.log(numbers(row), step=row["round"])  # a step that it has already is ignored

    def end(self, result: Row | None) -> None:
        self._run.summary.update(numbers(result or {}, "result/"))
        self._run.finish(exit_code=0 if result else 1)


@dataclass
class MLflow:
    """MLflow: its client writes numbers and options to ``MLFLOW_TRACKING_URI``, a server, a database or a folder."""

    experiment: str = "fedkd"
    _client: Any = field(default=None, init=False, repr=False)
    _run: str = field(default="", init=False, repr=False)
    _known: float = field(default=0, init=False, repr=False)  # the last round that MLflow has already

    def __post_init__(self) -> None:
        _require("mlflow")

    def start(self, entry: Entry) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
        tags = {"fedkd.group": entry.group, "fedkd.identity": entry.identity}
        earlier = self._client.search_runs([experiment], f"tags.`fedkd.identity` = '{entry.identity}'")
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            self._known = earlier[0].data.metrics.get("round", 0)
            return
        self._known = 0
        self._run = self._client.create_run(experiment, tags=tags, run_name=entry.name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in entry.config.items()])

    def log(self, row: Row) -> None:
        if row["round"] > self._known:  # it would keep both values of a step
            self._write(numbers(row), row["round"])

    def end(self, result: Row | None) -> None:
        if result:
            self._write(numbers(result, "result/"), result["rounds"])
        self._client.set_terminated(self._run, "FINISHED" if result else "KILLED")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in values.items()])
