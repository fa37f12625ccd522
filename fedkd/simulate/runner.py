"""The runner: all runs of a config (algorithms and seeds), from the first byte to ``result.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from fedkd.core import run_directory, specs
from fedkd.core.errors import FedkdError
from fedkd.data.loading import choose_dataset
from fedkd.evaluation import metrics
from fedkd.evaluation.report import figure, header, table
from fedkd.evaluation.report.screen import HEAD, Screen
from fedkd.simulate.experiment import Experiment, prepared
from fedkd.simulate.rounds import Reply, run_rounds

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.evaluation.metrics import Row
    from fedkd.simulate.rounds import Exchange, Round


class RunExchange(Protocol):
    """An exchange that is also given the config of the run it is for."""

    def __call__(self, run: Config, kind: str, number: int, messages: Mapping[int, Tensors]) -> Iterable[Reply]: ...


def run_all(config: Config, connect: Callable[[], RunExchange]) -> None:
    """Run every algorithm and seed of ``config`` over what ``connect`` returns; ``result.json`` is written last.

    Raises:
        FedkdError: what stopped it; ``result.json`` then holds its code and message.

    """
    out = Path(config.out)
    screen = Screen(Console(stderr=config.json))
    finished: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    status, dataset, fallback, reason = "failed", config.dataset, "", dict[str, object]()
    try:
        dataset, fallback = choose_dataset(config.dataset, config.data_dir)
        runs = config.runs(dataset)
        _prepare(runs, fallback, out, screen)
        exchange = connect()
        with screen.progress(len(runs) * config.rounds):
            for run in runs:
                rows = curves[run.algorithm, run.seed] = []
                finished.append(_run(run, partial(exchange, run), out, screen, rows))
        figure.draw(curves, _title(runs[0]), out)
        for grid in (table.side_by_side(finished, curves), table.ledger(finished)):
            screen.show(grid.rich())
        status = "ok"
    except FedkdError as error:
        if error.details:
            run_directory.log(out, error.details)
        reason = {"code": error.code, "message": str(error)}
        raise
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
        status = "interrupted"
        raise
    finally:
        result = {"status": status, "out": str(out), "dataset": dataset, "dataset_fallback": fallback, "runs": finished}
        run_directory.write_json(out / "result.json", result | reason)


def _prepare(runs: list[Config], fallback: str, out: Path, screen: Screen) -> None:
    """Build every experiment once, so that a mistake shows before the first round; print what will run."""
    experiments: dict[int, Experiment] = {}
    for run in runs:
        experiments.setdefault(run.seed, prepared(run))
    first = experiments[runs[0].seed]
    environment = run_directory.environment(first.setup.trainer.device, runs[0].dataset, fallback)
    run_directory.write_json(out / "env.json", environment)
    _save_partitions(out / "partition.npz", experiments)
    screen.print(f"run directory: {out}")
    for title, text in header.lines(first, fallback):
        screen.print(f"{title:>13}  {text}")


def _run(run: Config, exchange: partial[Iterable[Reply]], out: Path, screen: Screen, rows: list[Row]) -> Row:
    """One algorithm with one seed: its rows as the rounds end, its student, its summary."""
    experiment = prepared(run)
    round_ = None
    screen.print(f"\n{run.algorithm}, seed {run.seed}; {header.uplink(experiment)}\n{HEAD}")
    watched = screen.watch(exchange, run, experiment.training_partition.sizes.tolist())
    for round_, seconds in _timed(
        _attributed(
            run,
            run_rounds(experiment.algorithm, experiment.setup, watched, experiment.clients, experiment.channel),
        )
    ):
        with _attributing(run):
            row = _evaluated(experiment, watched, round_, seconds)
        where = f"{run.algorithm} seed {run.seed}"
        for client, reason in round_.failures.items():
            run_directory.log(out, f"{where} round {round_.number} client {client}\n{reason}")
        for client, reason in row["evaluation_failures"].items():
            run_directory.log(out, f"{where} evaluation {round_.number} client {client}\n{reason}")
        run_directory.append(out / "rounds.jsonl", row)
        rows.append(row)
        screen.row(row, run.rounds)
    assert round_ is not None
    with _attributing(run):
        weights = experiment.algorithm.global_model(experiment.setup, round_.state)
        summary = metrics.run_summary(experiment, rows, experiment.partition.digest())
    if weights:
        experiment.student(weights).save(out / _student_name(run, out))
    return summary


def _evaluated(experiment: Experiment, exchange: Exchange, round_: Round, seconds: float) -> Row:
    """The row of a round, with the time of the round and of its evaluation."""
    config, start = experiment.config, time.perf_counter()
    is_due = round_.number % config.evaluate_every == 0 or round_.number == config.rounds
    clients = metrics.evaluate_clients(experiment, exchange, round_) if is_due else None
    row = metrics.round_row(experiment, round_, metrics.evaluate_student(experiment, round_), clients)
    evaluation = time.perf_counter() - start
    return {**row, "training_seconds": round(seconds, 5), "evaluation_seconds": round(evaluation, 5)}


def _timed(rounds: Iterable[Round]) -> Iterator[tuple[Round, float]]:
    """Each round with its duration in seconds, without what is done between rounds."""
    start = time.perf_counter()
    for round_ in rounds:
        yield round_, time.perf_counter() - start
        start = time.perf_counter()


def _attributed(run: Config, rounds: Iterator[Round]) -> Iterator[Round]:
    with _attributing(run):
        yield from rounds


def _attributing(run: Config) -> AbstractContextManager[None]:
    """Attribute what a user-defined component raises on the server to that component."""
    kinds = ("algorithm", "aggregator", "loss")
    return specs.attributing([(kind, getattr(run, kind)) for kind in kinds], "on the server")


def _student_name(run: Config, out: Path) -> str:
    """The first run's student has the plain name; the others are named after their run."""
    if not (out / "student.safetensors").exists():
        return "student.safetensors"
    return run_directory.student_file(run.algorithm, run.seed)


def _save_partitions(path: Path, experiments: Mapping[int, Experiment]) -> None:
    """For each seed: samples of every client (split at ``ends``), class counts and proxy samples."""
    import numpy as np

    from fedkd.data import skew

    arrays: dict[str, Any] = {}
    for seed, experiment in experiments.items():
        partition = experiment.partition
        arrays[f"seed{seed}_rows"] = partition.rows
        arrays[f"seed{seed}_ends"] = partition.ends
        labels = experiment.train.labels.numpy()
        arrays[f"seed{seed}_counts"] = skew.counts(labels, partition, experiment.setup.classes)
        if experiment.proxy_rows is not None:
            arrays[f"seed{seed}_proxy"] = experiment.proxy_rows
    part = path.with_name("partition.part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(path)


def _title(config: Config) -> str:
    return f"{config.dataset}, {config.clients} clients, {config.partitioner}, {config.model}"
