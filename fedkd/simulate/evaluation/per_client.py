"""Results of each client's own model, and how they are spread over the clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from fedkd.core.communication.validation import MAX_EXAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.data.readers import Images
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.rounds import Round

Entry = dict[str, Any]  # the results of a client in a round
LOCAL = ("local_samples", "local_accuracy", "local_loss")  # metrics of a client's model on its local test split
#: The numbers in a row of ``rounds.jsonl`` that are made of those of the clients.
KEYS = [f"{name}{of}" for name in ("client_accuracy", "local_accuracy") for of in ("", "_worst", "_p10", "_std")]
KEYS += ["student_local_accuracy"]


def evaluated_images(test: Images, count: int, has_student: bool) -> tuple[Images, Tensor]:
    """The images on which clients' models are evaluated, and which of them count for the clients' accuracy.

    All test images are predicted if the clients' models give the test accuracy, since there is no student.
    """
    import torch

    from fedkd.data.readers import stratified

    sample = stratified(test.labels, count or len(test))
    if not has_student or len(sample) == len(test):
        return test, sample
    return test.select(sample), torch.arange(len(sample))


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """For each image whether its class is predicted; where a model has diverged, it is not."""
    return (logits.argmax(-1) == labels) & logits.isfinite().all(-1)


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and loss of a model, which may have diverged."""
    from fedkd.training import loop

    return is_right(logits, labels).double().mean().item(), loop.score(logits, labels)[1]


def entry(client: int, samples: int, logits: Tensor, labels: Tensor, metrics: Mapping[str, float]) -> Entry:
    """A client's results: its number of samples, and its model on test images and on its local test split."""
    accuracy, loss = score(logits, labels)
    return {
        "client": client,
        "samples": samples,
        "accuracy": accuracy,
        "loss": _finite(loss),
        "local_samples": int(metrics.get("local_samples", 0)),
        "local_accuracy": metrics.get("local_accuracy"),
        "local_loss": _finite(metrics.get("local_loss", math.nan)),
    }


def fault(metrics: Mapping[str, float]) -> str:
    """What is wrong with the metrics of a client's local test split; empty if nothing is."""
    samples, accuracy, _ = (metrics.get(name, 1.0) for name in LOCAL)
    is_possible = len(metrics.keys() & LOCAL) in (0, len(LOCAL)) and 1 <= samples <= MAX_EXAMPLES and 0 <= accuracy <= 1
    return "" if is_possible else "sent impossible results of its local test split"


def summary(clients: Sequence[Entry]) -> dict[str, float | None]:
    """`KEYS`: mean, worst, 10th percentile and standard deviation over the clients; None without any."""
    values = [*_spread(clients, "accuracy"), *_spread(clients, "local_accuracy")]
    values.append(_mean(_known(clients, "student_local_accuracy")))
    return dict(zip(KEYS, values, strict=True))


def with_student(experiment: Experiment, round_: Round, clients: Sequence[Entry]) -> list[Entry]:
    """The same with the accuracy of the global student on each local test split, if the server has these."""
    import numpy as np
    import torch

    weights = experiment.algorithm.global_model(experiment.setup, round_.state)
    rows = [experiment.local_test_rows(each["client"]) for each in clients]
    if not weights or not any(map(len, rows)):
        return [{**each, "student_local_accuracy": None} for each in clients]
    images = experiment.samples(np.concatenate(rows))
    logits = experiment.setup.trainer.predict(experiment.setup.student, weights, images.pixels)
    by_client = torch.split(is_right(logits, images.labels).double(), [len(each) for each in rows])
    accuracies = [own.mean().item() if len(own) else None for own in by_client]
    return [{**each, "student_local_accuracy": one} for each, one in zip(clients, accuracies, strict=True)]


def _known(clients: Sequence[Entry], key: str) -> list[float]:
    return [each[key] for each in clients if each[key] is not None]


def _spread(clients: Sequence[Entry], key: str) -> list[float | None]:
    import numpy as np

    values = _known(clients, key)
    if not values:
        return [None] * 4
    return [fmean(values), min(values), float(np.percentile(values, 10)), pstdev(values)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _finite(value: float) -> float | None:
    """A number that JSON has; None for the loss of a model that diverged."""
    return value if math.isfinite(value) else None
