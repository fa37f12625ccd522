"""Options that a run is given and does not use: a notice names each of them."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

from fedkd.algorithms.ensemble import Ensemble
from fedkd.core import notes, specs
from fedkd.core.communication.codecs import Codec
from fedkd.simulate.experiment import algorithm_of
from fedkd.training import models

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm
    from fedkd.core.config import Config

CODECS = ("uplink_codec", "downlink_codec")


def say(config: Config, given: Collection[str] = ()) -> None:
    """Print a notice for each unused option that is given, or whose value is not its default."""
    methods = {run.algorithm: algorithm_of(run) for run in config.runs(config.dataset)}
    codecs = {name: specs.call("codec", getattr(config, name)) for name in CODECS}
    labels = {name for name, codec in codecs.items() if isinstance(codec, Codec) and codec.labels}
    by_methods = {name: _by_method(algorithm, labels) for name, algorithm in methods.items()}
    by_options = _by_options(config, [model for algorithm in methods.values() for model in algorithm.private_models])
    for option in sorted({*given, *config.changed()}):
        by = [name for name, options in by_methods.items() if option in options] or by_options.get(option, [])
        if by:
            notes.say_unused(option, ", ".join(by))


def _by_method(algorithm: Algorithm, labels: Collection[str]) -> Collection[str]:
    """The options that a method does not use; ``labels`` are those for which codecs of soft labels are given."""
    if algorithm.codecs is not None:
        return algorithm.ignores | {*CODECS}
    unused = algorithm.ignores - ({*CODECS} - {*labels})
    if isinstance(algorithm, Ensemble) and algorithm.downlink != "labels":
        unused |= {"downlink_codec"} if algorithm.downlink == "nothing" else {"downlink_codec"} & {*labels}
    # A codec of soft labels encodes logits as probabilities at the temperature.
    return unused - ({"temperature"} if labels and not unused.issuperset(labels) else set())


def _by_options(config: Config, private_models: Collection[str]) -> dict[str, list[str]]:
    """The options that are not used because of other ones, and these."""
    unused = {}
    if "momentum" not in inspect.signature(specs.built_in("optimizer", config.optimizer).func).parameters:
        unused["momentum"] = [f"--optimizer {config.optimizer}"]
    networks = [*models.split(config.model), *([config.student] if config.student else [])]
    if not any(map(models.has_norm, [*networks, *private_models])):
        unused["norm"] = networks
    for of, steps in (("local", config.local_steps), ("distill", config.distill_steps)):
        if steps:
            unused[f"{of}_epochs"] = [f"a run with --{of}-steps {steps}"]
    if config.engine == "ray":
        unused |= {option: ["--engine ray"] for option in ("workers", "client_timeout")}
    return unused
