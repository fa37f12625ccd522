"""Playing what a config asks for, from the first byte to ``result.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from fedkd.core import run_directory, specs
from fedkd.core.errors import FedkdError
from fedkd.evaluation import metrics
from fedkd.evaluation.report import figure, header, table
from fedkd.evaluation.report.screen import HEAD, Screen
from fedkd.simulate.experiment import Experiment, choose_dataset, prepared
from fedkd.simulate.rounds import Reply, play

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.evaluation.metrics import Row
    from fedkd.simulate.rounds import Exchange, Round


class Send(Protocol):
    """An exchange that is told which run it is for."""

    def __call__(self, member: Config, kind: str, number: int, requests: Mapping[int, Tensors]) -> Iterable[Reply]: ...


def conduct(config: Config, connect: Callable[[], Send]) -> None:
    """Play every member of ``config`` over what ``connect`` gives; ``result.json`` comes last.

    Raises:
        FedkdError: what stopped it; the result then says so too.

    """
    out = Path(config.out)
    screen = Screen(Console(stderr=config.json))
    finished: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    status, dataset, fallback, reason = "failed", config.dataset, "", dict[str, object]()
    try:
        dataset, fallback = choose_dataset(config)
        members = config.members(dataset)
        _prepare(members, fallback, out, screen)
        send = connect()
        for member in members:
            rows = curves[member.algorithm, member.seed] = []
            finished.append(_member(member, partial(send, member), out, screen, rows))
        figure.draw(curves, _title(members[0]), out)
        for grid in (table.side_by_side(finished, curves), table.ledger(finished)):
            screen.show(grid.rich())
        status = "ok"
    except FedkdError as error:
        if error.details:
            run_directory.log(out, error.details)
        reason = {"code": error.code, "message": str(error)}
        raise
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or asked to terminate
        status = "interrupted"
        raise
    finally:
        result = {"status": status, "out": str(out), "dataset": dataset, "dataset_fallback": fallback, "runs": finished}
        run_directory.write_json(out / "result.json", result | reason)


def _prepare(members: list[Config], fallback: str, out: Path, screen: Screen) -> None:
    """Build every experiment once, so that a mistake shows before the first round; say what will run."""
    experiments: dict[int, Experiment] = {}
    for member in members:
        experiments.setdefault(member.seed, prepared(member))
    first = experiments[members[0].seed]
    run_directory.write_json(
        out / "env.json", run_directory.environment(first.kit.device, members[0].dataset, fallback)
    )
    run_directory.save_partitions(out / "partition.npz", experiments)
    for title, text in header.lines(first, fallback):
        screen.say(f"{title:>10}  {text}")


def _member(member: Config, exchange: partial[Iterable[Reply]], out: Path, screen: Screen, rows: list[Row]) -> Row:
    """One method with one seed: its rows as they come, its student, its summary."""
    experiment = prepared(member)
    screen.say(f"\n{member.algorithm}, seed {member.seed}\n{HEAD}")
    round_ = None
    with screen.live(member.algorithm, member.rounds):
        watched = screen.watch(exchange, member.rounds)
        for round_, seconds in _timed(
            _blamed(member, play(experiment.algorithm, experiment.kit, watched, experiment.clients, experiment.wire))
        ):
            with _blaming(member):
                row = _measured(experiment, watched, round_, seconds)
            for client, reason in round_.failures.items():
                run_directory.log(
                    out, f"{member.algorithm} seed {member.seed} round {round_.number} client {client}\n{reason}"
                )
            for client, reason in row["evaluation_failures"].items():
                run_directory.log(
                    out, f"{member.algorithm} seed {member.seed} evaluation {round_.number} client {client}\n{reason}"
                )
            run_directory.append(out / "rounds.jsonl", row)
            rows.append(row)
            screen.row(row, member.rounds)
    assert round_ is not None
    with _blaming(member):
        student = experiment.algorithm.deploy(experiment.kit, round_.state)
        summary = metrics.summary(experiment, rows, experiment.dealt.digest())
    if student:
        experiment.student(student).save(out / _student_name(member, out))
    return summary


def _measured(experiment: Experiment, exchange: Exchange, round_: Round, seconds: float) -> Row:
    """The row of a round, with what it took and what measuring it took."""
    config, start = experiment.config, time.perf_counter()
    due = round_.number % config.evaluate_every == 0 or round_.number == config.rounds
    members = metrics.ensemble(experiment, exchange, round_) if due else None
    row = metrics.row(experiment, round_, metrics.student(experiment, round_), members)
    return {**row, "seconds": round(seconds, 5), "evaluation_seconds": round(time.perf_counter() - start, 5)}


def _timed(rounds: Iterable[Round]) -> Iterator[tuple[Round, float]]:
    """Each round with the seconds it took, what is done between rounds left out."""
    start = time.perf_counter()
    for round_ in rounds:
        yield round_, time.perf_counter() - start
        start = time.perf_counter()


def _blamed(member: Config, rounds: Iterator[Round]) -> Iterator[Round]:
    with _blaming(member):
        yield from rounds


def _blaming(member: Config) -> AbstractContextManager[None]:
    """Whatever somebody's own algorithm raises on the server is called by its name."""
    kinds = ("algorithm", "aggregator", "loss")
    return specs.blaming([(kind, getattr(member, kind)) for kind in kinds], "on the server")


def _student_name(member: Config, out: Path) -> str:
    """The first method's first student has the plain name; the others say whose they are."""
    if not (out / "student.safetensors").exists():
        return "student.safetensors"
    return run_directory.student_file(member.algorithm, member.seed)


def _title(config: Config) -> str:
    return f"{config.dataset}, {config.clients} clients, {config.partitioner}, {config.model}"
