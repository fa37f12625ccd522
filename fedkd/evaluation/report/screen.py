"""The screen during a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fedkd.evaluation.report.text import percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.evaluation.metrics import Row
    from fedkd.simulate.rounds import Exchange, Reply

HEAD = (
    f"{'round':>7}  {'test acc':>8}  {'loss':>6}  {'teacher':>8}  {'clients':>8}  {'uplink':>8}  {'downlink':>8}  "
    f"{'training':>8}  {'evaluation':>10}"
)
QUIET = 10.0  # seconds between plain lines inside a round
TRAINING_SHARE = 0.75  # of the time of a round, until a round has been measured


@dataclass
class Estimate:
    """How much of all rounds is done, and when the rest will be.

    A round is done in two parts, training and evaluation, whose shares of its time are measured. Within a part,
    clients count by their numbers of samples.
    """

    rounds: int
    start: float = field(default_factory=time.monotonic)
    done: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0})

    def update(self, finished_rounds: int, kind: str, share: float) -> None:
        """Take note of the share of a part of the round after the finished ones."""
        total = sum(self.spent.values())
        training = self.spent["train"] / total if total and self.spent["evaluate"] else TRAINING_SHARE
        within = share * training if kind == "train" else training + share * (1 - training)
        self.done = max(self.done, (finished_rounds + min(within, 1.0)) / self.rounds)

    def remaining(self, now: float | None = None) -> float | None:
        """Seconds until all rounds are done; None before anything is."""
        if not self.done:
            return None
        elapsed = (time.monotonic() if now is None else now) - self.start
        return elapsed * (1 - self.done) / self.done


class Remaining(ProgressColumn):
    """The remaining time of a task that has a field ``end``: the time at which it will be done."""

    def render(self, task: Task) -> Text:
        end = task.fields.get("end")
        return Text("" if end is None else f"about {clock(max(0.0, end - time.monotonic()))} left")


@dataclass
class Screen:
    """Where a run is shown. ``progress`` shows one bar for all rounds; ``watch`` wraps an exchange to move it."""

    console: Console
    _bar: Progress | None = None
    _task: TaskID = TaskID(0)
    _estimate: Estimate = field(default_factory=lambda: Estimate(1))
    _finished: int = 0

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table at its own width: a narrow terminal may wrap its lines, but no number is cut."""
        needed = Console(width=1000).measure(table).maximum
        wide = Console(file=self.console.file, width=max(self.console.width, needed), no_color=True)
        wide.print(table)

    @contextmanager
    def progress(self, rounds: int) -> Iterator[None]:
        """Show the progress of so many rounds while the block runs: a bar, if there is a terminal."""
        self._estimate, self._finished = Estimate(rounds), 0
        if not self.console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), Remaining())
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("starting", total=1.0, end=None)
            yield
        self._bar = None

    def watch(self, exchange: Exchange, run: Config, sizes: Sequence[int]) -> Exchange:
        """The same exchange; every reply moves the bar. ``sizes`` are the clients' numbers of samples."""

        def watched(kind: str, number: int, messages: Mapping[int, Tensors]) -> Iterable[Reply]:
            part = {"train": "training", "evaluate": "evaluation"}.get(kind, kind)
            where = f"{run.algorithm}, seed {run.seed}, round {number} of {run.rounds}"
            total = sum(1 + sizes[client] for client in messages)
            started = last_line = time.monotonic()
            share, replies = 0.0, 0
            self._move(f"{where}: {part}, 0 of {len(messages)} clients", kind, 0.0)
            for reply in exchange(kind, number, messages):
                replies += 1
                share += (1 + sizes[reply.client]) / total
                server = "evaluation" if kind == "evaluate" else "server update"
                doing = f"{part}, {replies} of {len(messages)} clients" if replies < len(messages) else server
                self._move(f"{where}: {doing}", kind, share)
                if self._bar is None and time.monotonic() - last_line > QUIET:
                    last_line = time.monotonic()
                    self.say(f"         round {number}: {doing}{self._left()}")
                yield reply
            self._estimate.spent[kind] = self._estimate.spent.get(kind, 0.0) + time.monotonic() - started

        return watched

    def _move(self, description: str, kind: str, share: float) -> None:
        self._estimate.update(self._finished, kind, share)
        if self._bar is not None:
            left = self._estimate.remaining()
            end = None if left is None else time.monotonic() + left
            self._bar.update(self._task, description=description, completed=self._estimate.done, end=end)

    def _left(self) -> str:
        left = self._estimate.remaining()
        return "" if left is None else f"; about {clock(left)} left in all"

    def row(self, row: Row, rounds: int) -> None:
        """One line of numbers for a round, and one for each client that failed."""
        self._finished += 1
        loss = "–" if row["test_loss"] is None else f"{row['test_loss']:.3f}"
        self.say(
            f"{row['round']:>3}/{rounds:<3}  {percent(row['test_accuracy']):>8}  {loss:>6}  "
            f"{percent(row['teacher_accuracy']):>8}  {percent(row['client_accuracy']):>8}  "
            f"{size(row['uplink_serialized_bytes']):>8}  {size(row['downlink_serialized_bytes']):>8}  "
            f"{seconds(row['training_seconds']):>8}  {seconds(row['evaluation_seconds']):>10}"
        )
        for client, reason in row["failures"].items():
            self.say(f"         client {client} failed: {reason}")
        for client, reason in row["evaluation_failures"].items():
            self.say(f"         client {client} is not in the evaluated ensemble: {reason}")


def clock(left: float) -> str:
    """A duration as h:mm:ss."""
    minutes, rest = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
