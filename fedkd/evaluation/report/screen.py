"""The screen while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedkd.evaluation.report.text import percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

    from fedkd.core.tensors import Tensors
    from fedkd.evaluation.metrics import Row
    from fedkd.simulate.rounds import Exchange, Reply

HEAD = (
    f"{'round':>7}  {'test acc':>8}  {'loss':>6}  {'teacher':>8}  {'clients':>8}  {'up':>8}  {'down':>8}  {'time':>8}"
)
QUIET = 10.0  # seconds between plain lines inside a round


@dataclass
class Screen:
    """Where a run is shown. ``watch`` wraps an exchange, so that every reply moves the bar."""

    console: Console
    bar: Progress = field(init=False)
    task: Any = None

    def __post_init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table at its own width: a narrow terminal may wrap its lines, but no number is cut."""
        needed = Console(width=1000).measure(table).maximum
        wide = Console(file=self.console.file, width=max(self.console.width, needed), no_color=True)
        wide.print(table)

    @contextmanager
    def live(self, name: str, rounds: int) -> Iterator[None]:
        """Show a bar while the block runs, where there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        self.task = self.bar.add_task(f"{name}: round 1 of {rounds}", total=None, note="")
        with self.bar:
            yield
        self.bar.remove_task(self.task)
        self.task = None

    def watch(self, exchange: Exchange, rounds: int) -> Exchange:
        """The same exchange, with the bar moving at every reply."""

        def watched(kind: str, number: int, requests: Mapping[int, Tensors]) -> Iterable[Reply]:
            doing = {"train": "clients train", "evaluate": "clients are measured"}.get(kind, kind)
            spoken = time.monotonic()
            self._show(f"round {number} of {rounds}", f"{doing}, 0 of {len(requests)}", 0, len(requests))
            for done, reply in enumerate(exchange(kind, number, requests), 1):
                note = f"{doing}, {done} of {len(requests)}" if done < len(requests) else "the server works"
                self._show(f"round {number} of {rounds}", note, done, len(requests))
                if self.task is None and time.monotonic() - spoken > QUIET:
                    self.say(f"         round {number}: {doing}, {done} of {len(requests)}")
                    spoken = time.monotonic()
                yield reply

        return watched

    def _show(self, description: str, note: str, done: int, total: int) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=description, note=note, completed=done, total=total)

    def row(self, row: Row, rounds: int) -> None:
        """One line of numbers for a round, and one for each client that failed."""
        loss = "–" if row["test_loss"] is None else f"{row['test_loss']:.3f}"
        self.say(
            f"{row['round']:>3}/{rounds:<3}  {percent(row['test_accuracy']):>8}  {loss:>6}  "
            f"{percent(row['teacher_accuracy']):>8}  {percent(row['client_accuracy']):>8}  "
            f"{size(row['bytes_up']):>8}  {size(row['bytes_down']):>8}  "
            f"{seconds(row['seconds'] + row['evaluation_seconds']):>8}"
        )
        for client, reason in row["failures"].items():
            self.say(f"         client {client} was not counted: {reason}")
        for client, reason in row["evaluation_failures"].items():
            self.say(f"         client {client} is no part of the teacher that is measured: {reason}")
