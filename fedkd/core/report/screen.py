"""The screen during a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from fedkd.core import cli
from fedkd.core.errors import last_line
from fedkd.core.report.grid import Format, Grid
from fedkd.core.report.text import percent, seconds, size

if TYPE_CHECKING:
    from fedkd.core.communication.replies import Expected, Failure, Reply
    from fedkd.core.config import Config
    from fedkd.core.report.rows import Row
    from fedkd.core.tensors import Tensors
    from fedkd.simulate.rounds import Exchange

HEAD = (
    f"{'round':>7}  {'test acc':>8}  {'loss':>6}  {'teacher':>8}  {'clients':>8}  {'uplink':>8}  {'downlink':>8}  "
    f"{'training':>8}  {'evaluation':>10}"
)
LISTED = 5  # clients in a line
QUIET = 10.0  # seconds between plain lines inside a round
TRAINING_FRACTION = 0.75  # of the time of a round, until an evaluation has been measured
ALMOST_DONE = 0.999  # a bar that is full before the end would stop its clock


@dataclass
class Estimate:
    """The fraction of all rounds that is done, and the remaining time.

    A round is training (with the server update), then evaluation; their fractions of its time are measured. Within
    each of the two, clients count by their numbers of samples. All rounds are taken to last equally long.
    """

    rounds: int
    start: float
    done: float = 0.0
    finished_rounds: int = 0
    training: float = TRAINING_FRACTION  # of the time of a round
    spent: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0})
    _kind: str = ""
    _since: float = 0.0

    def begin(self, kind: str, now: float) -> None:
        """Record that the training or the evaluation of a round begins, and what came before it ends."""
        if self._kind:
            self.spent[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def update(self, kind: str, fraction: float) -> None:
        """Record that ``fraction`` of the training or evaluation of the current round is done."""
        fraction = min(fraction, 1.0)
        of_round = fraction * self.training if kind == "train" else self.training + fraction * (1 - self.training)
        self._reach(self.finished_rounds + of_round)

    def end_round(self, now: float, skipped: int = 0) -> None:
        """Record that a round is finished, and that so many rounds after it are not run."""
        self.begin("", now)
        if self.spent["evaluate"]:
            self.training = self.spent["train"] / sum(self.spent.values())
        self.finished_rounds += 1
        self.rounds -= skipped
        self._reach(self.finished_rounds)

    def _reach(self, rounds: float) -> None:
        self.done = max(self.done, min(rounds / self.rounds, ALMOST_DONE))

    def remaining(self, now: float) -> float | None:
        """Seconds until all rounds are done; None before the first reply."""
        if not self.done:
            return None
        return (now - self.start) * (1 - self.done) / self.done


class Description(ProgressColumn):
    """The description of a task, cut where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class Remaining(ProgressColumn):
    """The remaining time of a task that has a field ``end``: the time at which it will be done."""

    def render(self, task: Task) -> Text:
        end = task.fields.get("end")
        return Text("" if end is None else f"about {duration(max(0.0, end - task.get_time()))} left")


@dataclass
class Screen:
    """Where a run is shown. ``progress`` shows one bar for all rounds; ``watch`` wraps an exchange to advance it."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    _bar: Progress | None = None
    _task: TaskID | None = None
    _shown: set[tuple[str, str]] = field(default_factory=set)  # kinds of failures
    _excluded: dict[tuple[str, int], set[int]] = field(default_factory=dict)  # clients, by method and seed
    _estimate: Estimate = field(default_factory=lambda: Estimate(1, 0.0))

    def print(self, text: str = "") -> None:
        """Print a line; a terminal may wrap it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, grid: Grid, form: Format = "terminal") -> None:
        """Print a table at its own width: a narrow terminal may wrap its lines, but no number is cut."""
        if form != "terminal":
            print(f"{grid.markdown() if form == 'markdown' else grid.latex()}\n", file=self.console.file)
            return
        table = grid.rich()
        needed = Console(width=1000).measure(table).maximum
        wide = cli.Console(file=self.console.file, width=max(self.console.width, needed), no_color=True)
        wide.print(table)

    @contextmanager
    def progress(self, rounds: int) -> Iterator[None]:
        """Show the progress of ``rounds`` rounds while the block runs: a bar, if there is a terminal."""
        self._estimate = Estimate(rounds, self.clock())
        if not self.console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(table_column=Column(no_wrap=True)),
            BarColumn(20, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            Remaining(table_column=Column(no_wrap=True)),
            Description(),
        )
        try:
            with Progress(*columns, console=self.console, transient=True, get_time=self.clock) as self._bar:
                self._task = self._bar.add_task("starting", total=1.0, end=None)
                yield
        finally:
            self._bar = None

    def watch(self, exchange: Exchange, run: Config, sizes: Sequence[int]) -> Exchange:
        """The same exchange; every reply advances the bar. ``sizes`` are the clients' numbers of samples."""

        def watched(
            kind: str, number: int, messages: Mapping[int, Tensors], expected: Mapping[int, Expected]
        ) -> Iterable[Reply]:
            part = {"train": "training", "evaluate": "evaluation"}.get(kind, kind)
            where = f"{run.algorithm}, seed {run.seed}, round {number} of {run.rounds}"
            total = sum(1 + sizes[client] for client in messages)
            last_line = self.clock()
            fraction = 0.0
            self._estimate.begin(kind, last_line)
            self._advance(f"{where}: {part}, 0 of {len(messages)} clients", kind, 0.0)
            for replies, reply in enumerate(exchange(kind, number, messages, expected), 1):
                fraction += (1 + sizes[reply.client]) / total
                server = "evaluation" if kind == "evaluate" else "server update"
                doing = f"{part}, {replies} of {len(messages)} clients" if replies < len(messages) else server
                self._advance(f"{where}: {doing}", kind, fraction)
                if self._bar is None and self.clock() - last_line > QUIET:
                    last_line = self.clock()
                    self.print(f"         round {number}: {doing}{self._left()}")
                yield reply

        return watched

    def _advance(self, description: str, kind: str, fraction: float) -> None:
        self._estimate.update(kind, fraction)
        if self._bar is not None and self._task is not None:
            now = self.clock()
            left = self._estimate.remaining(now)
            end = None if left is None else now + left
            self._bar.update(self._task, description=description, completed=self._estimate.done, end=end)

    def _left(self) -> str:
        left = self._estimate.remaining(self.clock())
        return "" if left is None else f"; about {duration(left)} left in all"

    def row(self, row: Row, rounds: int, is_last: bool = False) -> None:
        """One line of numbers for a round, and what failed in it; the last round can be an early one."""
        self._estimate.end_round(self.clock(), rounds - row["round"] if is_last else 0)
        accuracy = row["validation_accuracy"]
        validation = "" if accuracy is None else f"  {percent(accuracy):>10}"
        loss = "–" if row["test_loss"] is None else f"{row['test_loss']:.3f}"
        self.print(
            f"{row['round']:>3}/{rounds:<3}  {percent(row['test_accuracy']):>8}  {loss:>6}  "
            f"{percent(row['teacher_accuracy']):>8}  {percent(row['client_accuracy']):>8}  "
            f"{size(row['uplink_serialized_bytes']):>8}  {size(row['downlink_serialized_bytes']):>8}  "
            f"{seconds(row['training_seconds']):>8}  {seconds(row['evaluation_seconds']):>10}{validation}"
        )
        self._failures("updates missing", row["failures"])
        run = row["algorithm"], row["seed"]
        if excluded := set(row["excluded"]) - self._excluded.get(run, set()):
            self.print(f"         excluded from now on: {_listed(excluded)}")
        self._excluded[run] = set(row["excluded"])
        self._failures("clients not in the evaluated ensemble", row["evaluation_failures"])

    def _failures(self, what: str, failures: Sequence[Row]) -> None:
        """How many failures there are of each cause, and the first of each kind with its reason."""
        causes: dict[str, list[int]] = {}
        for failure in failures:
            causes.setdefault(failure["cause"], []).append(failure["client"])
        if causes:
            counts = ", ".join(f"{len(clients)} {cause} ({_listed(clients)})" for cause, clients in causes.items())
            self.print(f"         {what}: {counts}")
        for failure in failures:
            kind = failure["cause"], re.sub(r"[0-9]+", "", failure["reason"])
            if kind not in self._shown and failure["reason"] != failure["cause"]:
                self.print(f"         client {failure['client']}: {failure['reason']}")
            self._shown.add(kind)

    def not_saved(self, failures: Sequence[Failure]) -> None:
        """Say which clients' models could not be saved."""
        listed = [{"client": each.client, "cause": each.cause, "reason": last_line(each.reason)} for each in failures]
        self._failures("models of clients not saved", listed)

    def end(self, run: Row, config: Config) -> None:
        """Say why a run ended if it was before its last round, and which round was its best."""
        if run["ended"] != "rounds":
            ended = f"patience {config.patience}" if run["ended"] == "patience" else run["ended"]
            self.print(f"         ended after round {run['rounds']} of {config.rounds}: {ended}")
        if run["best_round"] is not None:
            accuracies = [percent(run[f"best_{name}_accuracy"]) for name in ("validation", "test")]
            self.print(
                f"         best round: {run['best_round']} (validation accuracy {accuracies[0]}, "
                f"test accuracy {accuracies[1]})"
            )


def _listed(clients: Iterable[int]) -> str:
    """The numbers of some clients; of many, the first."""
    first, *rest = sorted(clients)
    shown = [first, *rest][:LISTED]
    return "client" + "s" * bool(rest) + f" {', '.join(map(str, shown))}" + ", …" * (len(rest) + 1 > LISTED)


def duration(left: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
