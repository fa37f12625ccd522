"""The measurements of ``--dry-run``: two rounds of a few clients and batches, on the engine of the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from fedkd.algorithms.dense import DataFree
from fedkd.core import memory, runtime, specs
from fedkd.core.communication.replies import Expected
from fedkd.core.tensors import itemsize
from fedkd.simulate.evaluation import metrics
from fedkd.simulate.rounds import Memories, Progress, participants, run_rounds
from fedkd.simulate.saving import QUERY

if TYPE_CHECKING:
    from fedkd.core.communication.replies import Reply
    from fedkd.core.config import Config
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.flower.local_grid import LocalGrid
    from fedkd.simulate.rounds import Exchange, Round

STEPS = (2, 20)  # batches of the two measurements
EPOCHS = {2: 1, 20: 2}  # of a server that trains without data, each of which has many batches
MOST = 100  # updates that are aggregated at once; ten times as many test images are predicted


@dataclass(frozen=True)
class Measured:
    """Two rounds of the clients of one model, which train for ``steps`` batches."""

    steps: int
    clients: int
    samples: int  # of a client, in the mean
    start: float  # seconds until the first client can train, more than later
    training: tuple[float, float]  # seconds in which all of them train, in the first and in the second round
    evaluation: tuple[float, float]  # seconds: of all of these clients, and of the student
    uplink: tuple[float, float]  # bytes per client in the first and in the second round
    downlink: tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """What was measured of the clients of each model; and the seconds of an aggregation with so many server steps."""

    clients: Mapping[str, Measured]
    server_steps: int
    aggregation: float


class Grids:
    """The local engine of a run for each number of batches."""

    def __init__(self, config: Config, is_fresh: bool, most: int) -> None:
        from fedkd.simulate.flower.local_grid import LocalGrid, count_workers
        from fedkd.training import together

        self.device = runtime.device(config.device)
        self.are_together = together.pays(self.device)
        self.workers = count_workers(config.workers, most, config.threads, self.device)
        self.configs = {steps: short(config, steps) for steps in STEPS}
        self._grids = {
            steps: LocalGrid(
                "fedkd.simulate.flower.client_app:app",
                config.clients,
                each.run_config(),
                self.workers,
                fork=is_fresh and self.device == "cpu" and sys.platform == "linux",
                together=self.are_together,
            )
            for steps, each in reversed(self.configs.items())  # each ends before those that were started before it
        }
        self._stacks = {steps: ExitStack() for steps in STEPS}

    def __enter__(self) -> Grids:
        """All are started before anything is computed, after which a process cannot be forked."""
        for steps, grid in self._grids.items():
            self._stacks[steps].enter_context(grid)
        runtime.settle(self.configs[STEPS[0]].threads)
        return self

    def __exit__(self, *_: object) -> None:
        for stack in self._stacks.values():
            stack.close()

    def exchange(self, run: Config, steps: int) -> Exchange:
        """What sends messages of a run with so many batches."""
        from fedkd.simulate.flower import server_app

        grid: LocalGrid = self._grids[steps]
        return partial(server_app.exchange, grid, range(1, run.clients + 1), run, Memories(uuid4().hex))

    def memory(self) -> int | None:
        """Bytes of RAM at the peak, since processes keep what they free; those of the first measurement end."""
        self._stacks[STEPS[0]].close()
        return memory.used()


def short(config: Config, steps: int) -> Config:
    """The same run with so many batches, without what ends it early or lets clients fail."""
    return replace(
        config,
        rounds=2,
        local_steps=steps,
        distill_steps=steps if config.distill_epochs or config.distill_steps else 0,
        distill_patience=0,
        uplink_codec=without_coder(config.uplink_codec),
        downlink_codec=without_coder(config.downlink_codec),
        faults="",
        round_timeout=0.0,
        round_retries=0,
        client_timeout=0.0,
        min_clients=1,
        exclude_after=1,
        patience=0,
        stop_when="",
    )


def without_coder(codec: str) -> str:
    """A codec whose bytes follow from shapes."""
    for option in ("coder", "delta"):
        codec, _ = specs.without(codec, option)
    return codec


def few_epochs(experiment: Experiment, steps: int) -> Experiment:
    """The same with few epochs of a server that trains without data, instead of batches of distillation."""
    if isinstance(experiment.algorithm, DataFree):
        return replace(experiment, algorithm=replace(experiment.algorithm, epochs=EPOCHS[steps]))
    return experiment


def server_steps(experiment: Experiment, config: Config) -> int:
    """The epochs of a server that trains without data; of others, the batches of a distillation."""
    algorithm = experiment.algorithm
    if isinstance(algorithm, DataFree):
        return algorithm.epochs
    epoch = -(-experiment.setup.proxy.samples // config.distill_batch_size)
    return config.distill_steps or config.distill_epochs * epoch


def measure(experiment: Experiment, grids: Grids, steps: int) -> Measurement:
    """Two rounds of the clients of each model, and the aggregation of as many updates as a round of the run has."""
    setup, run, algorithm = experiment.setup, experiment.config, experiment.algorithm
    found = {model: _of_model(experiment, grids, steps, model) for model in setup.models}
    _, one, two = found[setup.models[0]]
    if len(found) > 1:  # some servers need updates of all models
        chosen = [next(iter(round_.updates)) for _, round_, _ in found.values()]
        (_, one), (_, two) = _rounds(experiment, _Timed(grids.exchange(run, steps)), chosen)
    updates = {setup.model_of(client): update for client, update in two.updates.items()}
    copies = range(min(MOST, participants(experiment.clients, run.participation)))
    begun = time.perf_counter()
    algorithm.aggregate(setup, one.state, {client: updates[setup.model_of(client)] for client in copies}, seed=0)
    aggregation = time.perf_counter() - begun
    return Measurement(
        {model: each for model, (each, _, _) in found.items()}, server_steps(experiment, run), aggregation
    )


def _of_model(experiment: Experiment, grids: Grids, steps: int, model: str) -> tuple[Measured, Round, Round]:
    """Two rounds of some clients with this model, after a first one in which processes warm up."""
    run = experiment.config
    chosen = _chosen(experiment, grids, model)
    exchange = _Timed(grids.exchange(run, steps))
    empty: dict[int, Tensors] = {client: {} for client in chosen}
    list(exchange(QUERY, 0, empty, dict.fromkeys(chosen, Expected({}))))  # each process reads the data
    start = exchange.seconds
    first, _ = next(_rounds(experiment, exchange, chosen))
    start += first
    exchange = _Timed(grids.exchange(run, steps))
    (first, one), (second, two) = _rounds(experiment, exchange, chosen)
    evaluation = _evaluation(experiment, exchange, two) if steps == STEPS[-1] else (0.0, 0.0)
    count = len(chosen)
    measured = Measured(
        steps=steps,
        clients=count,
        samples=int(experiment.training_partition.sizes[chosen].mean()),
        start=max(0.0, start - first),
        training=(first, second),
        evaluation=evaluation,
        uplink=(_most_uplink(experiment, chosen[0], one) / count, _most_uplink(experiment, chosen[0], two) / count),
        downlink=(one.serialized.downlink_arrays / count, two.serialized.downlink_arrays / count),
    )
    return measured, one, two


def _chosen(experiment: Experiment, grids: Grids, model: str) -> list[int]:
    """As many clients with this model as compute at once, those whose number of samples is nearest to the median."""
    models, sizes = experiment.setup.models, experiment.training_partition.sizes
    own = [client for client in range(experiment.clients) if models[client % len(models)] == model]
    most = participants(experiment.clients, experiment.config.participation)
    median = np.median(sizes[own])
    nearest = sorted(own, key=lambda client: abs(sizes[client] - median))
    return sorted(nearest[: min(most, MOST if grids.are_together else grids.workers)])


class _Timed:
    """An exchange that adds up its seconds."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Iterator[Reply]:
        replies = iter(self._exchange(*arguments))
        while True:
            begun = time.perf_counter()
            reply = next(replies, None)
            self.seconds += time.perf_counter() - begun
            if reply is None:
                return
            yield reply


def _evaluation(experiment: Experiment, exchange: _Timed, round_: Round) -> tuple[float, float]:
    """The seconds of an evaluation of the clients of a round, and of the student; of the second one, as above."""
    images = experiment.test.first(10 * MOST)
    times = (len(experiment.test) + len(experiment.setup.validation)) / len(images)
    clients = student = 0.0
    for _ in range(2):
        exchange.seconds = 0.0
        metrics.evaluate_clients(experiment, exchange, round_)
        clients, begun = exchange.seconds, time.perf_counter()
        metrics.evaluate_student(experiment, round_, images)
        student = times * (time.perf_counter() - begun)
    return clients, student


def _rounds(experiment: Experiment, exchange: _Timed, chosen: Collection[int]) -> Iterator[tuple[float, Round]]:
    """Two rounds of these clients only, with the seconds in which they train."""
    setup, algorithm = experiment.setup, experiment.algorithm
    left_out = {client: 1 for client in range(experiment.clients) if client not in chosen}
    start = Progress(0, algorithm.initial_state(setup), refusals=left_out)
    exchange.seconds = 0.0
    for each in run_rounds(algorithm, setup, exchange, experiment.clients, experiment.channel, after=start):
        yield exchange.seconds, each
        exchange.seconds = 0.0


def _most_uplink(experiment: Experiment, client: int, round_: Round) -> float:
    """Bytes of a round's updates, with the declared shapes where those of an update depend on data."""
    declared = experiment.algorithm.upload_spec(experiment.setup, client, round_.number)
    if not is_bounded(declared):
        return round_.serialized.uplink_arrays
    most = sum(prod(map(abs, shape)) * itemsize(shape) for shape in declared.values()) * len(round_.updates)
    return round_.serialized.uplink_arrays - round_.uplink.encoded + most


def is_bounded(shapes: Shapes) -> bool:
    """Whether a shape says how much a tensor has at most."""
    return any(extent < 0 for shape in shapes.values() for extent in shape)
