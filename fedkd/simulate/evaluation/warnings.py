"""Warnings: what is probably wrong with a run, in one sentence each with what to do (docs/output-files.md).

A law of rows is a function of the rows so far and of the `Facts`: its sentence, or an empty text. `Watch` says each
law once. `before` has what is known before the first round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.core.communication.ledger import is_soft_label
from fedkd.core.report.text import percent, size
from fedkd.simulate.evaluation import metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedkd.algorithms.base import Algorithm
    from fedkd.core.report.rows import Row
    from fedkd.data.skew import Skew
    from fedkd.simulate.experiment import Experiment

    Keys = NDArray[np.void]  # hashes of images

ERRORS = 3  # standard errors: chance alone exceeds them in one of 700 cases
PATIENCE = 5  # rounds for which a student may be at chance, and a teacher below its clients
SKEWED = 0.3  # total-variation distance beyond what sampling explains; Dirichlet with alpha 0.5 has 0.43 in all
COLLAPSED = 0.01  # share of the largest entropy
MISCALIBRATED = 0.1
COPIES = 0.01  # share of the proxy: data sets that are published have a few images twice


@dataclass(frozen=True)
class Facts:
    """What the laws of rows need to know: numbers of classes and test images, and what the method does.

    ``fedavg_bytes`` are those of FedAvg for a client and round, both directions, if the method sends soft labels on
    proxy samples instead; otherwise infinity.
    """

    classes: int
    test_samples: int
    client_test_samples: int
    has_teacher: bool
    chooses_aggregator: bool
    fedavg_bytes: float


def facts(experiment: Experiment) -> Facts:
    """The facts of one method with one seed."""
    setup, algorithm = experiment.setup, experiment.algorithm
    shapes = setup.trainer.weight_shapes(setup.student).values()
    sends_labels = uses_proxy(algorithm) and any(map(is_soft_label, algorithm.upload_spec(setup, 0, 1)))
    return Facts(
        classes=setup.classes,
        test_samples=len(experiment.test),
        client_test_samples=len(experiment.test_sample),
        has_teacher=not {"proxy_samples", "distill_learning_rate"} <= algorithm.ignores,
        chooses_aggregator="aggregator" not in algorithm.ignores,
        fedavg_bytes=2 * 4 * sum(map(math.prod, shapes)) if sends_labels else math.inf,
    )


def student_at_chance(rows: Sequence[Row], facts: Facts) -> str:
    """In each of the last five rounds, the student's accuracy is at most 1/C + 3 sqrt((1/C)(1 - 1/C) / n).

    The square root is the standard error of guessing one of C classes for n images.
    """
    chance = 1 / facts.classes
    bound = chance + ERRORS * standard_error(chance, facts.test_samples)
    last = rows[-PATIENCE:]
    is_student = len(last) == PATIENCE and all(row["test_loss"] is not None for row in last)
    if not is_student or any(row["test_accuracy"] > bound for row in last):
        return ""
    return (
        f"The student has been at chance for {PATIENCE} rounds (test accuracy {percent(rows[-1]['test_accuracy'])} "
        f"for {facts.classes} classes); try another --learning-rate, or more --local-epochs."
    )


def teacher_below_clients(rows: Sequence[Row], facts: Facts) -> str:
    """From round 5 on, the teacher's accuracy is below the mean m of the clients' by more than 3 sqrt(m (1 - m) / n).

    n is the number of images. Earlier rounds say little: clients that are hardly trained agree on wrong classes.
    """
    teacher, clients = rows[-1]["teacher_accuracy"], rows[-1]["client_accuracy"]
    if not facts.has_teacher or rows[-1]["round"] < PATIENCE or teacher is None or clients is None:
        return ""
    if teacher >= clients - ERRORS * standard_error(clients, facts.client_test_samples):
        return ""
    advice = "try another --aggregator" if facts.chooses_aggregator else "try another method, or its options"
    return f"The teacher ({percent(teacher)}) is worse than the mean of its clients ({percent(clients)}); {advice}."


def uniform_teacher(rows: Sequence[Row], facts: Facts) -> str:
    """In each of the last five rounds, the mean entropy of the soft labels is above 0.99 ln C."""
    last = _entropies(rows, facts)
    if not last or min(last) <= (1 - COLLAPSED) * math.log(facts.classes):
        return ""
    return (
        f"The teacher's soft labels are the same for all classes (mean entropy {last[-1]:.2f} of at most "
        f"{math.log(facts.classes):.2f} nats), so there is nothing to learn from them; lower --temperature, or train "
        "the clients more."
    )


def hard_teacher(rows: Sequence[Row], facts: Facts) -> str:
    """In each of the last five rounds, the entropy is below 0.01 ln C and the calibration error above 0.1.

    A teacher that is sure and right is no concern.
    """
    last = _entropies(rows, facts)
    is_wrong = last and all(row["teacher_ece"] > MISCALIBRATED for row in rows[-PATIENCE:])
    if not is_wrong or max(last) >= COLLAPSED * math.log(facts.classes):
        return ""
    advice = "raise --temperature" + ", or try another --aggregator" * facts.chooses_aggregator
    return (
        f"The teacher's soft labels have almost all probability on one class (mean entropy {last[-1]:.3f} nats), but "
        f"are right for {percent(rows[-1]['teacher_accuracy'])} only; {advice}."
    )


def _entropies(rows: Sequence[Row], facts: Facts) -> list[float]:
    """Those of the last five rounds; none if one of them was not evaluated, or the method has no teacher."""
    found = [row.get("teacher_entropy") for row in rows[-PATIENCE:]]
    known = [value for value in found if value is not None]
    return known if facts.has_teacher and len(known) == PATIENCE else []


def more_than_fedavg(rows: Sequence[Row], facts: Facts) -> str:
    """Soft labels of a client and round, both directions as encoded, take more bytes than the weights in FedAvg."""
    row = rows[-1]
    messages = row["participants"] + len(row["failures"])
    sent = row["uplink_encoded_bytes"] / row["participants"] + row["downlink_encoded_bytes"] / messages
    if sent <= facts.fedavg_bytes:
        return ""
    return (
        f"A client sends and receives {size(sent)} in a round, more than with FedAvg and the same model "
        f"({size(facts.fedavg_bytes)}); lower --proxy-samples or use an --uplink-codec of fewer bits."
    )


LAWS = (student_at_chance, teacher_below_clients, uniform_teacher, hard_teacher, more_than_fedavg)


class Watch:
    """The laws of rows for one method with one seed."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._rows: list[Row] = []
        self._laws = list(LAWS)

    def see(self, row: Row) -> list[str]:
        """The sentences of the laws that hold since this row."""
        self._rows.append(row)
        found = {law: text for law in self._laws if (text := law(self._rows, self._facts))}
        self._laws = [law for law in self._laws if law not in found]
        return list(found.values())


def before(experiment: Experiment) -> list[str]:
    """What is known before the first round."""
    setup, algorithm = experiment.setup, experiment.algorithm
    found = []
    skew = None if algorithm.pools_data else metrics.partition_skew(experiment)
    if skew and algorithm.upload_spec(setup, 0, 1):
        models = [name for name in dict.fromkeys(setup.models) if setup.trainer.has_batch_norm(name)]
        found.append(batch_norm_on_skewed_data(skew, setup.classes, models))
    if uses_proxy(algorithm) and experiment.proxy_rows is not None:  # `proxies.draw` leaves copies out of other sets
        keys = experiment.train.keys
        proxy, private = keys[experiment.proxy_rows], keys[experiment.partition.rows]
        found += [test_images_in_proxy(proxy, experiment.test.keys), private_images_in_proxy(proxy, private)]
    return list(filter(None, found))


def uses_proxy(algorithm: Algorithm) -> bool:
    """Whether the method uses the proxy set."""
    return "proxy_samples" not in algorithm.ignores


def batch_norm_on_skewed_data(skew: Skew, classes: int, models: Sequence[str]) -> str:
    """Models with BatchNorm layers, and clients whose labels differ by 0.3 more than those of a random partition.

    A client of n samples at random has an expected distance of at most sqrt(C / (2 pi n)); n is the median here.
    """
    if not models or skew.distance <= SKEWED + math.sqrt(classes / (2 * math.pi * skew.median)):
        return ""
    return (
        f"The clients' classes differ (mean total-variation distance {skew.distance:.2f}), and so do the statistics of "
        f"the BatchNorm layers of {', '.join(models)}; use --norm group, or a model without such layers."
    )


def test_images_in_proxy(proxy: Keys, test: Keys) -> str:
    """Some images of the proxy are test images, pixel by pixel."""
    count = copies(proxy, test)
    if not count:
        return ""
    return (
        f"{count:,} of {len(proxy):,} proxy images are also test images, so that test accuracies are too high; "
        "remove the copies from the data set."
    )


def private_images_in_proxy(proxy: Keys, private: Keys) -> str:
    """More than 1% of the images of the proxy are private images, too."""
    count = copies(proxy, private)
    if count <= COPIES * len(proxy):
        return ""
    return (
        f"{count:,} of {len(proxy):,} proxy images are also private images of clients, so that the proxy is not a set "
        "of new images; remove the copies from the data set, or use another --proxy."
    )


def copies(keys: Keys, others: Keys) -> int:
    """How many of the images with these hashes are among others."""
    import numpy as np

    return int(np.isin(keys, others).sum())


def standard_error(accuracy: float, images: int) -> float:
    """That of an accuracy on so many images: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)
