"""``--dry-run``: bytes, time and memory of a run, from two rounds of a few batches on the engine of the run.

A few clients of each model train for some batches, and the server distills for as many. Times are taken to grow with
the number of batches: what is measured with few and with more of them gives the time of one, and what else a round
takes. Clients, messages, workers and evaluation are those of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from fedkd.core import cli, specs
from fedkd.core.communication.channel import LAST_ROUND
from fedkd.core.communication.ledger import is_soft_label
from fedkd.core.notes import plain, say
from fedkd.core.report.grid import Grid
from fedkd.core.report.text import seconds, size
from fedkd.core.tensors import integer
from fedkd.data.loading import choose_dataset
from fedkd.simulate.experiment import prepared
from fedkd.simulate.measuring import STEPS, Grids, few_epochs, is_bounded, measure, server_steps, without_coder
from fedkd.simulate.rounds import participants, sample

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.measuring import Measured, Measurement

UNCERTAINTY = 0.3  # of times, as a fraction; more if other work shares the machine

Precision = Literal["exact", "at most", "about"]


@dataclass(frozen=True)
class Estimate:
    """What a method needs in a run, all seeds together. ``precision`` is that of the bytes of arrays as serialized.

    ``uplink_bytes`` and ``downlink_bytes`` are those of a round after the first one, in the mean.
    """

    algorithm: str
    uplink_bytes: float
    downlink_bytes: float
    total_bytes: int
    precision: Precision
    training_seconds: float
    evaluation_seconds: float
    held_bytes: int  # of updates that the server holds in a round, and did not in a measurement


@dataclass(frozen=True)
class _Line:
    """Seconds by the number of batches: ``base`` and ``slope`` times as many."""

    base: float
    slope: float

    @classmethod
    def through(cls, few: tuple[int, float], more: tuple[int, float]) -> _Line:
        slope = max(0.0, (more[1] - few[1]) / (more[0] - few[0])) if more[0] > few[0] else 0.0
        return cls(max(0.0, more[1] - slope * more[0]), slope)

    def at(self, steps: float) -> float:
        return self.base + self.slope * steps


def estimate(config: Config, is_fresh: bool) -> str:
    """A table of all methods, or JSON; ``is_fresh``: this process has computed nothing yet, so it can be forked."""
    with Grids(config, is_fresh, participants(config.clients, config.participation)) as grids:
        dataset, _ = choose_dataset(config.dataset, config.data_dir)
        runs = [replace(run, seeds=config.seeds) for run in config.runs(dataset) if run.seed == config.seed]
        say(f"dry run: measuring {plain(len(runs), 'method')} with up to {STEPS[-1]} batches")
        estimates = [_estimated(run, grids) for run in runs]
        used = grids.memory()
    about = {
        "dataset": dataset,
        "rounds": config.rounds,
        "seeds": config.seeds,
        "workers": grids.workers,
        "device": grids.device,
        "time_uncertainty": UNCERTAINTY,
        "memory_bytes": used and used + max(each.held_bytes for each in estimates),
    }
    if config.json:
        return json.dumps({**about, "methods": [asdict(each) for each in estimates]}, indent=2)
    console = cli.Console(width=100)
    with console.capture() as captured:
        console.print(_table(config, estimates, about).rich(), markup=False)
    return captured.get().rstrip()


def _table(config: Config, estimates: Iterable[Estimate], about: Mapping[str, Any]) -> Grid:
    words = {"exact": "", "at most": "≤ ", "about": "~ "}
    rows = [
        [
            each.algorithm,
            *(words[each.precision] + size(count) for count in (each.uplink_bytes, each.downlink_bytes)),
            words[each.precision] + size(each.total_bytes),
            *(seconds(value) for value in (each.training_seconds, each.evaluation_seconds)),
        ]
        for each in estimates
    ]
    caption = (
        f"{about['dataset']}, {plain(config.rounds, 'round')}, {plain(config.seeds, 'seed')}, {about['device']}, "
        f"{plain(about['workers'], 'worker')}. Bytes of all clients, per round (from the second on) and in total; "
        f"times are of all rounds, ±{100 * UNCERTAINTY:.0f}% or so on a machine without other work, without the start"
    )
    if about["memory_bytes"] is not None:
        caption += f". Memory: about {size(about['memory_bytes'])}"
    titles = ["method", "uplink / round", "downlink / round", "total", "training", "evaluation"]
    return Grid(titles, rows, f"{caption}.")


def _estimated(run: Config, grids: Grids) -> Estimate:
    """What a method needs, from its measurements with few and with more batches."""
    measured: list[Measurement] = []
    for steps in STEPS:
        full = prepared(grids.configs[steps].run(run.algorithm, run.seed, run.dataset))
        experiment = few_epochs(full, steps)
        measured.append(measure(experiment, grids, steps))
    first, later = _training(full, run, *measured)
    uplink, downlink = _bytes(experiment, run, measured[-1].clients)
    shown = slice(run.seeds, None) if run.rounds > 1 else slice(None)
    return Estimate(
        algorithm=run.algorithm,
        uplink_bytes=round(fmean(uplink[shown])),
        downlink_bytes=round(fmean(downlink[shown])),
        total_bytes=round(sum(uplink) + sum(downlink)),
        precision=_precision(experiment, run),
        training_seconds=round(first + later * (run.rounds - 1), 3),
        evaluation_seconds=round(_evaluations(experiment, run, measured[-1].clients), 3),
        held_bytes=_held_bytes(experiment, run, measured[-1].clients),
    )


def _held_bytes(experiment: Experiment, run: Config, measured: Mapping[str, Measured]) -> int:
    """Bytes of the updates that the server holds in a round of the run, and not in one that was measured."""
    sampled = participants(experiment.clients, run.participation)
    return round(max(each.uplink[1] * max(0, sampled - each.clients) for each in measured.values()))


def _training(experiment: Experiment, run: Config, few: Measurement, more: Measurement) -> tuple[float, float]:
    """The seconds of training in the first rounds of all seeds together, and in each later one of them."""
    lines = {
        model: tuple(
            _Line.through((before.steps, before.training[place]), (each.steps, each.training[place]))
            for place in (0, 1)
        )
        for (model, each), before in zip(more.clients.items(), few.clients.values(), strict=True)
    }
    server = _Line.through((few.server_steps, few.aggregation), (more.server_steps, more.aggregation))
    aggregation = server.at(server_steps(experiment, run))
    sampled = sample(experiment.clients, run.participation, run.seed, 1)
    models, sizes = experiment.setup.models, experiment.training_partition.sizes
    slots = max(each.clients for each in more.clients.values())
    seconds = [0.0, 0.0]
    for place in (0, 1):
        loads = [0.0] * slots
        for client in sorted(sampled, key=lambda each: -sizes[each]):
            model = models[client % len(models)]
            done = lines[model][place].at(_steps(run, int(sizes[client]), more.clients[model].samples))
            loads[loads.index(min(loads))] += done
        seconds[place] = max(loads) + aggregation
    start = max(each.start for each in more.clients.values())
    return run.seeds * (start + seconds[0]), run.seeds * seconds[1]


def _steps(run: Config, samples: int, measured: int) -> float:
    """The batches of a client with so many samples, as large as the mean batch of a client that was measured."""
    if run.local_steps:
        return run.local_steps
    return run.local_epochs * samples * -(-measured // run.batch_size) / measured


def _evaluations(experiment: Experiment, run: Config, measured: Mapping[str, Measured]) -> float:
    """The seconds of evaluation in all rounds of all seeds."""
    sampled = participants(experiment.clients, run.participation)
    rounds = run.rounds // run.evaluate_every + bool(run.rounds % run.evaluate_every)
    clients = fmean(each.evaluation[0] * sampled / each.clients for each in measured.values())
    student = fmean(each.evaluation[1] for each in measured.values())
    return run.seeds * (clients * rounds + student * run.rounds)


def _bytes(experiment: Experiment, run: Config, measured: Mapping[str, Measured]) -> tuple[list[float], list[float]]:
    """Uplink and downlink bytes of each round of each seed, the first rounds of all seeds first."""
    models = experiment.setup.models
    more_uplink, more_downlink = _delta_bytes(experiment, run)
    both: tuple[list[float], list[float]] = ([], [])
    for number in range(1, run.rounds + 1):
        for seed in range(run.seed, run.seed + run.seeds):
            clients = sample(experiment.clients, run.participation, seed, number)
            each = [measured[models[client % len(models)]] for client in clients]
            both[0].append(sum(one.uplink[number > 1] + more_uplink for one in each))
            both[1].append(sum(one.downlink[number > 1] + more_downlink for one in each))
    return both


def _delta_bytes(experiment: Experiment, run: Config) -> tuple[int, int]:
    """What deltas add to an uplink and a downlink message: a bit for each row, and the number of the last round."""
    from fedkd.simulate.flower.records import to_record

    deltas = [specs.without(text, "delta")[1] is not None for text in (run.uplink_codec, run.downlink_codec)]
    if experiment.algorithm.codecs or not any(deltas):
        return 0, 0
    spec = experiment.algorithm.upload_spec(experiment.setup, 0, 2)
    encoded = [shape for name, shape in spec.items() if not experiment.channel.uplink.labels or is_soft_label(name)]
    bitmap = sum(-(-prod(map(abs, shape[:-1])) // 8) for shape in encoded)
    return bitmap * deltas[0], bitmap * deltas[1] + to_record({LAST_ROUND: integer(0)}).count_bytes()


def _precision(experiment: Experiment, run: Config) -> Precision:
    """Whether the bytes of a run can be others than those of two short rounds."""
    spec, channel = experiment.algorithm.upload_spec(experiment.setup, 0, 2), experiment.channel
    own = experiment.algorithm.codecs
    codecs = zip(own or (run.uplink_codec, run.downlink_codec), (channel.uplink, channel.downlink), strict=True)
    used = [text for text, codec in codecs if not codec.labels or any(map(is_soft_label, spec))]
    depends_on_data = any(without_coder(text) != text for text in used)
    if is_bounded(spec) or (own and depends_on_data):
        return "about"
    ends = run.faults or run.round_timeout or run.patience or run.stop_when
    return "at most" if ends or depends_on_data else "exact"
