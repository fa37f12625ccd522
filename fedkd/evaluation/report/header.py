"""What is said before a run starts: data, partition, models, and what will travel."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from fedkd.communication.channel import break_even
from fedkd.core import tensors
from fedkd.data import skew
from fedkd.evaluation.report.text import percent, plain, size

if TYPE_CHECKING:
    from fedkd.simulate.experiment import Experiment

FLOAT = 4  # bytes of a float32, as weights and logits travel


def lines(experiment: Experiment, fallback: str) -> list[tuple[str, str]]:
    """Titles and texts that hold for every method of a comparison; ``fallback`` is why it is not CIFAR-10."""
    kit, config = experiment.kit, experiment.config
    private = len(experiment.dealt.rows)
    height, width = kit.proxy.shape[1:3]
    said = []
    if fallback:
        said.append(("notice", f"CIFAR-10 is not at hand, so this run falls back to digits. {fallback}"))
    said.append(
        (
            "data",
            f"{config.dataset}: {plain(private, 'private image')}, {len(kit.proxy):,} proxy ({config.proxy}), "
            f"{len(experiment.test):,} test, {height}x{width}, {kit.classes} classes",
        )
    )
    said.append(("partition", f"{config.partitioner}, {plain(config.clients, 'client')} {_shares(experiment)}"))
    counted = {name: tensors.numel(kit.initial(name)) for name in dict.fromkeys([*kit.models, kit.student])}
    said.append(("models", ", ".join(f"{name} ({count:,} numbers)" for name, count in counted.items())))
    answer, weights = prod(kit.answers()) * FLOAT, counted[kit.student] * FLOAT
    equal = int(break_even(counted[kit.student], 8 * FLOAT, kit.classes, 8 * FLOAT))
    said.append(
        (
            "travels",
            f"logits {list(kit.answers())}: {size(answer)} per client, round and direction; weights: {size(weights)}; "
            f"equal at {equal:,} proxy images; {_coded(experiment)}",
        )
    )
    return said


def _coded(experiment: Experiment) -> str:
    config, wire = experiment.config, experiment.wire
    if experiment.algorithm.codecs:
        return f"{config.algorithm} brings its own codecs"
    up, down = (
        f"{'soft labels as ' if codec.labels else 'coded as '}{text}"
        for codec, text in ((wire.up, config.up), (wire.down, config.down))
    )
    return f"{up} up, {down} down"


def _shares(experiment: Experiment) -> str:
    """How large the clients' shares are, and how unlike."""
    if not len(experiment.dealt.rows):
        return "that bring their own images"
    rows = len(experiment.train) - (0 if experiment.proxy_rows is None else len(experiment.proxy_rows))
    found = skew.measure(experiment.train.labels.numpy(), experiment.dealt, experiment.kit.classes, rows)
    return (
        f"of {found.smallest:,} to {found.largest:,} images (median {found.median:,}), "
        f"{found.classes:.1f} classes each in effect, {percent(found.distance, 0)} away from everybody's mix, "
        f"{percent(found.coverage, 0)} of the rows dealt"
    )
