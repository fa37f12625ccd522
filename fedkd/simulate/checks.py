"""What is refused before anything heavy is imported, so that a mistake is answered within a second."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fedkd.core import specs
from fedkd.core.errors import UsageError
from fedkd.data import partitioners, proxies, sources
from fedkd.simulate import faults, trackers, unused
from fedkd.simulate.evaluation import stopping
from fedkd.simulate.experiment import algorithm_of, attributing
from fedkd.simulate.rounds import participants
from fedkd.training import models, schedules

if TYPE_CHECKING:
    from fedkd.core.config import Config


def check(config: Config, given: Collection[str] = ()) -> None:
    """Resolve every name and option before anything heavy is imported; notices name ``given`` ones without effect.

    Raises:
        UsageError, PluginError: the first thing that cannot be used.

    """
    for run in config.runs(config.dataset):
        with attributing(run):
            _check_algorithm(run)
    _check_faults(config)
    specs.bind("aggregator", config.aggregator)
    specs.bind("loss", config.loss)
    for schedule in (config.schedule, config.distill_schedule):
        schedules.factor(schedule, 0, 1)
    if specs.built_in("optimizer", config.optimizer).keywords.get("nesterov") and not config.momentum:
        raise UsageError(f"--optimizer {config.optimizer} needs a --momentum above 0.")
    for codec in (config.uplink_codec, config.downlink_codec):
        specs.call("codec", codec)
    for model in [*models.split(config.model), *([config.student] if config.student else [])]:
        models.check(model)
    check_data(config)
    stopping.check(config)
    trackers.named(config)
    if config.save == "clients" and config.partitioner == partitioners.OWN:
        raise UsageError("--save clients: models that were trained on deployed nodes' own data stay on the nodes.")
    if config.validation and config.partitioner == partitioners.OWN:
        raise UsageError("--validation holds samples out of the training set, but deployed nodes keep their own data.")
    unused.say(config, given)


def check_data(config: Config) -> None:
    """Resolve the names of the data set, the proxy and the partitioner.

    Raises:
        UsageError, PluginError: the first thing that cannot be used.

    """
    if config.dataset != "auto":
        sources.named(config.dataset)
    proxies.parse(config.proxy)
    partitioners.check(config.partitioner)


def _check_algorithm(run: Config) -> None:
    """Refuse an algorithm that the other options exclude."""
    algorithm = algorithm_of(run)
    student = run.student or models.split(run.model)[0]
    if algorithm.needs_one_model and len({*models.split(run.model), student}) > 1:
        raise UsageError(
            f"{run.algorithm} sends weights, so clients and student need one model, "
            f"not --model {run.model} --student {student}."
        )
    if algorithm.assumes_sgd and specs.parse(run.optimizer).name != "sgd":
        raise UsageError(f"{run.algorithm} assumes that clients train with SGD, not --optimizer {run.optimizer}.")
    if algorithm.assumes_sgd and run.clip_norm:
        raise UsageError(f"{run.algorithm} needs the gradients as they are; leave out --clip-norm {run.clip_norm:g}.")
    if algorithm.needs_validation and not run.validation:
        raise UsageError(f"{run.algorithm} needs --validation N, samples on which the server measures clients' models.")
    if algorithm.pools_data and run.partitioner == partitioners.OWN:
        raise UsageError(
            f"{run.algorithm} needs all data in one place, but deployed nodes keep theirs; use another method."
        )
    if algorithm.reads_proxy_labels and proxies.parse(run.proxy)[0] is not None:
        raise UsageError(
            f"{run.algorithm} reads the proxy's labels, so the proxy must be held out of the data set "
            f"(--proxy holdout:size=N), not {run.proxy}."
        )


def _check_faults(config: Config) -> None:
    """Refuse faults that cannot be simulated here."""
    simulated = faults.parse(config.faults)
    sampled = participants(config.clients, config.participation)
    if config.min_clients > sampled:
        raise UsageError(f"--min-clients {config.min_clients} is more than the {sampled} clients of a round.")
    if simulated.late != "use":
        return
    if not config.round_timeout:
        raise UsageError("late=use needs --round-timeout: without it no update is late.")
    if config.proxy_samples:
        raise UsageError("late=use needs the same proxy samples in every round; leave out --proxy-samples.")
    for run in config.runs(config.dataset):
        if not algorithm_of(run).accepts_late:
            raise UsageError(f"late=use: {run.algorithm} asks for other proxy samples in each round; use late=drop.")
