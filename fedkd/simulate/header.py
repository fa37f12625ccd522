"""What is printed before a run starts: data, partition, models and communication."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from fedkd.core import tensors
from fedkd.core.communication.ledger import break_even, is_soft_label
from fedkd.core.notes import plain
from fedkd.core.report.text import percent, size
from fedkd.simulate.evaluation import metrics

if TYPE_CHECKING:
    from fedkd.data.skew import Skew
    from fedkd.simulate.experiment import Experiment

FLOAT = 4  # bytes of a float32, in which weights and logits are sent without a codec


def lines(experiment: Experiment, fallback: str) -> list[tuple[str, str]]:
    """Titles and texts that apply to all methods of a comparison; ``fallback`` is why it is not on CIFAR-10."""
    setup, config = experiment.setup, experiment.config
    height, width = setup.proxy.images.shape[1:3]
    notices = [("notice", f"CIFAR-10 is not available, so this run uses digits. {fallback}")] if fallback else []
    held_out = {"local test": len(experiment.local_tests.rows), "validation": config.validation}
    others = "".join(f"{count:,} {name}, " for name, count in held_out.items() if count)
    sample = len(experiment.test_sample)
    of_clients = f" ({sample:,} of them for clients and teacher)" if sample < len(experiment.test) else ""
    data = (
        f"{config.dataset}: {plain(len(experiment.partition.rows), 'private sample')}, {others}"
        f"{len(setup.proxy.images):,} proxy ({config.proxy}), {len(experiment.test):,} test{of_clients}, "
        f"{height}x{width} pixels, {setup.classes} classes"
    )
    names = dict.fromkeys([*setup.models, setup.student])
    parameters = {name: tensors.numel(setup.trainer.initial_weights(name)) for name in names}
    labels, weights = prod(setup.logits_shape) * FLOAT, parameters[setup.student] * FLOAT
    equal = int(break_even(parameters[setup.student], 8 * FLOAT, setup.classes, 8 * FLOAT))
    communication = (
        f"soft labels {list(setup.logits_shape)} take {size(labels)} as float32, weights of {setup.student} "
        f"{size(weights)}; break-even proxy size: {equal:,} samples"
    )
    return [
        *notices,
        ("data", data),
        ("partition", f"{config.partitioner}, {plain(config.clients, 'client')} {_skew(experiment)}"),
        ("models", ", ".join(f"{name} ({count:,} numbers)" for name, count in parameters.items())),
        ("device", f"{setup.trainer.device}, {setup.trainer.precision}"),
        ("communication", communication),
    ]


def too_small(experiment: Experiment) -> list[str]:
    """What has a single sample, on which a network with BatchNorm layers is not trained; empty local test splits."""
    setup, config, algorithm = experiment.setup, experiment.config, experiment.algorithm
    singles: dict[str, list[int]] = {}  # the clients that train a model on one sample
    for client in (experiment.training_partition.sizes == 1).nonzero()[0].tolist():
        for model in {setup.model_of(client), *algorithm.private_models}:
            singles.setdefault(model, []).append(client)
    found = [(f"with seed {config.seed}, {_clients(numbers)} one sample", name) for name, numbers in singles.items()]
    if setup.proxy.samples == 1:
        found += [("the proxy has one sample in a round", model) for model in {*setup.models, setup.student}]
    why = "is not trained on one sample, since it has BatchNorm layers"
    notices = sorted(f"{what}; {name} {why}" for what, name in found if setup.trainer.has_batch_norm(name))
    if config.local_test and experiment.sizes is not None:
        empty = (experiment.local_tests.sizes == 0).nonzero()[0].tolist()
        notices += [f"with seed {config.seed}, {_clients(empty)} no local test samples"] if empty else []
    return notices


def _clients(numbers: list[int]) -> str:
    """Clients by their numbers, at most ten of them, as the subject of ``has``."""
    named = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10:,} others" if len(numbers) > 10 else "")
    return f"client {named} has" if len(numbers) == 1 else f"clients {named} have"


def uplink(experiment: Experiment) -> str:
    """What a client of this method uploads in the first round, and the codecs of both directions."""
    setup, config, algorithm = experiment.setup, experiment.config, experiment.algorithm
    spec = algorithm.upload_spec(setup, 0, 1)
    codecs = algorithm.codecs or (config.uplink_codec, config.downlink_codec)
    total = sum(abs(prod(shape)) * tensors.itemsize(shape) for shape in spec.values())
    what = ", ".join(f"{name} {list(map(abs, shape))}" for name, shape in spec.items())
    if len(spec) > 3:
        what = f"{plain(len(spec), 'tensor')} of weights"
    if not spec:
        return "no communication"
    notes = [f"uplink per client and round: {what}, {size(total)} as float32"]
    channel = experiment.channel
    for way, text, codec in zip(("uplink", "downlink"), codecs, (channel.uplink, channel.downlink), strict=True):
        if codec.labels and not any(is_soft_label(name) for name in spec):
            notes.append(f"{way} not encoded, since {text} applies to soft labels only")
        elif text != "float32":
            notes.append(f"{way} encoded by {text}" + " (soft labels only)" * codec.labels)
    return "; ".join(notes)


def _skew(experiment: Experiment) -> str:
    result = metrics.partition_skew(experiment)
    return "that bring their own data" if result is None else skew_text(result)


def skew_text(result: Skew) -> str:
    """The sizes of the clients' shares, and how much they differ."""
    return (
        f"with {result.smallest:,} to {result.largest:,} samples (median {result.median:,}); effective number of "
        f"classes per client {result.classes:.1f}; mean total-variation distance to the global label distribution "
        f"{result.distance:.2f}; {percent(result.coverage, 0)} of the samples are assigned"
    )
