"""The runner: all runs of a config (algorithms and seeds), from the first byte to ``result.json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from fedkd.core import cli, environment, run_directory, specs
from fedkd.core.errors import DataError, FedkdError, ResumeError, StorageError, check_signaled, noticing_signals
from fedkd.core.report import figure, table
from fedkd.core.report.screen import HEAD, Screen
from fedkd.data.loading import choose_dataset
from fedkd.simulate import checkpoint, header, page, saving
from fedkd.simulate.evaluation import metrics, stopping
from fedkd.simulate.experiment import Experiment, prepared
from fedkd.simulate.following import Followers
from fedkd.simulate.rounds import Memories, run_rounds
from fedkd.training import models
from fedkd.training.models.checkpoint import other_classes

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.communication.replies import Expected, Reply
    from fedkd.core.config import Config
    from fedkd.core.report.grid import Grid
    from fedkd.core.report.rows import Row
    from fedkd.core.tensors import Tensors
    from fedkd.simulate.checkpoint import Checkpoint
    from fedkd.simulate.rounds import Exchange, Round


class RunExchange(Protocol):
    """An exchange that is also given the config of the run it is for."""

    def __call__(
        self,
        run: Config,
        memories: Memories,
        kind: str,
        number: int,
        messages: Mapping[int, Tensors],
        expected: Mapping[int, Expected],
    ) -> Iterable[Reply]: ...


def run_all(config: Config, connect: Callable[[], RunExchange]) -> Iterator[Row]:
    """Run every algorithm and seed of ``config`` over what ``connect`` returns; ``result.json`` is written last.

    Each row is yielded when its round is complete and on the disk. What the run directory has a checkpoint of is
    continued from there.

    Raises:
        FedkdError: what stopped it; ``result.json`` then holds its code and message.

    """
    out = Path(config.out)
    screen = Screen(cli.Console(stderr=config.json))
    finished: list[Row] = []
    rounds, followers = RoundsFile(out), Followers(config)
    has_begun = False
    status, dataset, fallback, reason = "failed", config.dataset, "", dict[str, object]()
    try:
        with noticing_signals():
            dataset, fallback = choose_dataset(config.dataset, config.data_dir)
            runs = config.runs(dataset)
            _prepare(runs, fallback, out, screen)
            checkpoints = _restored(config, runs, rounds)
            curves = [(run, rounds.curves[run.algorithm, run.seed]) for run in runs]
            exchange = connect()
            has_begun = True
            with screen.progress(sum(run.rounds - len(rows) for run, rows in curves if not stopping.ended(run, rows))):
                for run in runs:
                    is_first = all(row["evaluated_model"] == "clients" for row in finished)
                    start = checkpoints[run.algorithm, run.seed]
                    finished.append((yield from _run(run, exchange, out, screen, rounds, followers, start, is_first)))
                    followers.end(finished[-1])
            figure.draw(rounds.curves, figure.title(runs[0].run_config()), out)
            for grid in _tables(finished, rounds.curves):
                screen.show(grid)
            status = "ok"
    except FedkdError as error:
        if "Traceback" in error.details:
            run_directory.log(out, {"message": str(error), "details": error.details})
        reason = {"code": error.code, "message": str(error)}
        raise
    except OSError as error:  # the disk is full, or the directory cannot be written any more
        failure = StorageError.of(error, out)
        reason = {"code": failure.code, "message": str(failure)}
        raise failure from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):  # Ctrl-C, SIGTERM, or nobody reads further rows
        status = "interrupted"
        raise
    finally:
        result = {"status": status, "out": str(out), "dataset": dataset, "dataset_fallback": fallback, "runs": finished}
        result["warnings"] = followers.warnings
        if has_begun or not (out / "result.json").exists():  # a run that could not be resumed keeps its result
            run_directory.write_result(out, result | reason)
            page.write_run(out, result | reason, rounds.curves)
        followers.end(None)


def _restored(config: Config, runs: list[Config], rounds: RoundsFile) -> Mapping[tuple[str, int], Checkpoint | None]:
    """The checkpoints of a run directory, by method and seed; ``rounds`` then has their rows."""
    out = Path(config.out)
    checkpoints = checkpoint.load_all(out, runs)
    for run, start in zip(runs, checkpoints.values(), strict=True):
        if start and start.number > run.rounds:
            raise ResumeError(f"{run.algorithm} has {start.number} rounds already; --rounds cannot be less.")
    rounds.restore(checkpoints)
    run_directory.write(out / "config.toml", run_directory.toml(config))  # of a resumed run: with more rounds
    return checkpoints


def _prepare(runs: list[Config], fallback: str, out: Path, screen: Screen) -> None:
    """Build every experiment once, so that a mistake shows before the first round; print what will run."""
    experiments: dict[int, Experiment] = {}
    notices: dict[str, None] = {}  # in order, each once
    for run in runs:
        experiments.setdefault(run.seed, prepared(run))
        notices |= dict.fromkeys(header.too_small(prepared(run)))
    first = experiments[runs[0].seed]
    setup = first.setup
    named = list(dict.fromkeys([*setup.models, setup.student]))
    inputs = {**first.data_hashes, **models.digests(named)}
    trainer = setup.trainer
    note = environment.keep(out, trainer.device, trainer.precision, runs[0].dataset, fallback, inputs)
    about = [text for model in named for text in (setup.trainer.note(model), other_classes(model, first.test.names))]
    for about_file in dict.fromkeys(filter(None, about)):
        print(f"fedkd: {about_file}", file=sys.stderr)
    _save_partitions(out / "partition.npz", experiments)
    screen.print(f"run directory: {out}")
    noted = [("notice", text) for text in filter(None, (note, *notices))]
    for title, text in [*noted, *header.lines(first, fallback)]:
        screen.print(f"{title:>13}  {text}")


def _run(
    run: Config,
    exchange: RunExchange,
    out: Path,
    screen: Screen,
    rounds: RoundsFile,
    followers: Followers,
    start: Checkpoint | None,
    is_first: bool,
) -> Generator[Row, None, Row]:
    """One algorithm with one seed: its rows as the rounds end, its last and its best student; returns its summary."""
    experiment = prepared(run)
    head = HEAD + "  validation" * bool(run.validation)
    screen.print(f"\n{run.algorithm}, seed {run.seed}; {header.uplink(experiment)}\n{head}")
    if start:
        screen.print(f"         continued after round {start.number}")
    memories = start.memories if start else Memories(uuid4().hex)
    state, best = (start.progress.state, start.best) if start else (None, {})
    rows, logits = rounds.curves[run.algorithm, run.seed], None
    followers.start(experiment, memories.run, rows)
    watched = screen.watch(partial(exchange, run, memories), run, experiment.training_partition.sizes.tolist())
    left = run_rounds(
        experiment.algorithm,
        experiment.setup,
        watched,
        experiment.clients,
        experiment.channel,
        samples=experiment.sizes,
        after=start.progress if start else None,
    )
    for round_, seconds in _timed(_attributed(run, _until_ended(run, rows, left))):
        check_signaled()  # a client may have failed by a signal
        with _attributing(run):
            row, logits = _evaluated(experiment, watched, round_, seconds, rows)
        for failure in round_.failures:
            if "\n" in failure.reason:  # rows have the last line
                where = {"algorithm": run.algorithm, "seed": run.seed, "round": round_.number}
                run_directory.log(out, where | asdict(failure))
        rounds.append(row)
        state = round_.state
        if stopping.best(rows) is row:
            best = experiment.algorithm.global_model(experiment.setup, state)
        is_last = bool(stopping.ended(run, rows))
        if run.checkpoint_every and (round_.number % run.checkpoint_every == 0 or is_last):
            checkpoint.save(out, run, round_, memories, best, rows)
        screen.row(row, run.rounds, is_last)
        followers.log(run, row)
        yield row
    assert state is not None
    with _attributing(run):
        last = experiment.algorithm.global_model(experiment.setup, state)
        if logits is None:  # no round was left
            logits = metrics.predict_student(experiment, state, experiment.test)
        summary = metrics.run_summary(experiment, rows, experiment.partition.digest())
    screen.end(summary, run)
    if last and logits is not None:
        saving.save_students(experiment, last, best, logits, partial(saving.student_file, out, run, is_first))
    if run.save == "clients":
        failed = saving.save_clients(experiment, partial(exchange, run, memories), memories.latest, len(rows), out)
        screen.not_saved(failed)
    return summary


class RoundsFile:
    """``rounds.jsonl``: the rows of all rounds, method by method and seed by seed, as far as they are done."""

    def __init__(self, out: Path) -> None:
        self._path = out / "rounds.jsonl"
        self.curves: dict[tuple[str, int], list[Row]] = {}

    def restore(self, checkpoints: Mapping[tuple[str, int], Checkpoint | None]) -> None:
        """Read the rows of the rounds that have a checkpoint and drop all others.

        Raises:
            DataError: rows are missing, or have changed.

        """
        done = {key: each.number if each else 0 for key, each in checkpoints.items()}
        self.curves = {key: [] for key in done}
        if not any(done.values()):
            self._path.unlink(missing_ok=True)
            return
        for row in run_directory.rows(self._path) if self._path.exists() else ():
            key: tuple[Any, Any] = row.get("algorithm"), row.get("seed")
            if key in done and row.get("round") in range(1, done[key] + 1):
                self.curves[key].append(row)
        for key, rows in self.curves.items():
            if [row["round"] for row in rows] != list(range(1, done[key] + 1)):
                raise DataError(f"{self._path} lacks rounds of {key[0]} that its checkpoint has; start the run again.")
            if (saved := checkpoints[key]) and saved.rows != checkpoint.digest(rows):
                raise DataError(f"{self._path} is damaged: rows of {key[0]} have changed; start the run again.")
        self._write()

    def append(self, row: Row) -> None:
        """Add a row behind those of its method and seed."""
        keys = list(self.curves)
        key = row["algorithm"], row["seed"]
        self.curves[key].append(row)
        if any(self.curves[later] for later in keys[keys.index(key) + 1 :]):
            self._write()  # a run that is extended: methods that follow have rows already
        else:
            run_directory.append(self._path, row)

    def _write(self) -> None:
        rows = (row for rows in self.curves.values() for row in rows)
        run_directory.write(self._path, "".join(map(run_directory.line, rows)))


def _evaluated(
    experiment: Experiment, exchange: Exchange, round_: Round, seconds: float, before: Sequence[Row]
) -> tuple[Row, Tensor | None]:
    """The row of a round, with the time of the round and of its evaluation, and the student's logits.

    ``before`` are the rows before it.
    """
    config, start = experiment.config, time.perf_counter()
    evaluate_clients = partial(metrics.evaluate_clients, experiment, exchange, round_)
    clients = evaluate_clients() if round_.number % config.evaluate_every == 0 else None
    (test, logits), validation = metrics.evaluate_student(experiment, round_, experiment.test), None
    if config.validation:
        validation, _ = metrics.evaluate_student(experiment, round_, experiment.setup.validation)
    row = partial(metrics.round_row, experiment, round_, test, validation=validation)
    if clients is None and stopping.ended(config, [*before, row(None)]):
        clients = evaluate_clients()
    evaluation = time.perf_counter() - start
    times = {"training_seconds": round(seconds, 5), "evaluation_seconds": round(evaluation, 5)}
    return {**row(clients), **times}, logits


def _timed(rounds: Iterable[Round]) -> Iterator[tuple[Round, float]]:
    """Each round with its duration in seconds, without what is done between rounds."""
    start = time.perf_counter()
    for round_ in rounds:
        yield round_, time.perf_counter() - start
        start = time.perf_counter()


def _until_ended(run: Config, rows: Sequence[Row], rounds: Iterator[Round]) -> Iterator[Round]:
    """The rounds until the run has ended by ``rows``, to which the caller adds the row of each."""
    while not stopping.ended(run, rows):
        yield next(rounds)


def _attributed(run: Config, rounds: Iterator[Round]) -> Iterator[Round]:
    with _attributing(run):
        yield from rounds


def _attributing(run: Config) -> AbstractContextManager[None]:
    """Attribute what a user-defined component raises on the server to that component."""
    kinds = ("algorithm", "aggregator", "loss")
    return specs.attributing([(kind, getattr(run, kind)) for kind in kinds], "on the server")


def _save_partitions(path: Path, experiments: Mapping[int, Experiment]) -> None:
    """For each seed: samples of every client (split at ``ends``), class counts, client ids, held-out samples."""
    import numpy as np

    from fedkd.data import skew

    arrays: dict[str, Any] = {}
    for seed, experiment in experiments.items():
        partition = experiment.partition
        arrays[f"seed{seed}_rows"] = partition.rows
        arrays[f"seed{seed}_ends"] = partition.ends
        labels = experiment.train.labels.numpy()
        arrays[f"seed{seed}_counts"] = skew.counts(labels, partition, experiment.setup.classes)
        if partition.ids:
            arrays[f"seed{seed}_ids"] = np.asarray(partition.ids)
        if experiment.proxy_rows is not None:
            arrays[f"seed{seed}_proxy"] = experiment.proxy_rows
        if experiment.config.local_test:
            tests = experiment.local_tests
            arrays |= {f"seed{seed}_local_test_rows": tests.rows, f"seed{seed}_local_test_ends": tests.ends}
        if experiment.config.validation:
            arrays[f"seed{seed}_validation"] = experiment.validation_rows
    with run_directory.atomic(path) as part:
        np.savez_compressed(part, **arrays)


def _tables(finished: Sequence[Row], curves: table.Curves) -> list[Grid]:
    grids = table.side_by_side(finished, curves), table.costs(curves), table.ledger(finished), table.failures(curves)
    return [grid for grid in grids if grid]
