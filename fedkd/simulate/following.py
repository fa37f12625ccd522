"""What follows a run row by row without changing it: the trackers of ``--tracker``, and warnings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core.errors import Terminated, last_line
from fedkd.core.notes import say
from fedkd.simulate import trackers
from fedkd.simulate.evaluation import stopping, warnings

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.core.report.rows import Row
    from fedkd.simulate.experiment import Experiment


class Followers:
    """The trackers of a run and its ``warnings``, for one entry after the other.

    A tracker that raises an exception is left out from then on, with a notice: it never ends a run.
    """

    def __init__(self, config: Config) -> None:
        self._trackers = trackers.named(config)
        self._started = False
        self._watch: warnings.Watch
        self.warnings: list[Row] = []

    def start(self, experiment: Experiment, identity: str, rows: Sequence[Row]) -> None:
        """Begin an entry after the rounds of ``rows``. If none is left, trackers are not started."""
        run = experiment.config
        self._watch = warnings.Watch(warnings.facts(experiment))
        self._warn(run, None, warnings.before(experiment))
        for row in rows:
            self._warn(run, row["round"], self._watch.see(row))
        self._started = not stopping.ended(run, rows)
        entry = trackers.entry(run, Path(run.out), identity, len(rows))
        self._each("before round 1" if not rows else f"after round {len(rows)}", lambda one: one.start(entry))

    def log(self, run: Config, row: Row) -> None:
        """Pass on a new row."""
        self._warn(run, row["round"], self._watch.see(row))
        self._each(f"in round {row['round']}", lambda one: one.log(copy.deepcopy(row)))

    def end(self, result: Row | None) -> None:
        """End the entry, if it has begun: with its summary, or with none if it cannot be completed."""
        self._each("at the end of a run", lambda one: one.end(copy.deepcopy(result)))
        self._started = False

    def _warn(self, run: Config, number: int | None, texts: Sequence[str]) -> None:
        where = "" if number is None else f"{run.algorithm}, seed {run.seed}, round {number}: "
        for text in texts:
            self.warnings.append({"round": number, "algorithm": run.algorithm, "seed": run.seed, "text": text})
            say(f"{where}{text}")

    def _each(self, when: str, call: Callable[[trackers.Tracker], None]) -> None:
        for text, tracker in list(self._trackers.items()) if self._started else ():
            try:
                call(tracker)
            except Terminated:
                raise
            except (Exception, SystemExit) as error:
                del self._trackers[text]
                reason = f"{type(error).__name__}: {last_line(str(error))}"
                say(f"--tracker {text} failed {when} and is left out from now on; the run goes on ({reason}).")
