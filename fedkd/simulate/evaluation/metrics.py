"""Metrics of a round, and the summary of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedkd.core.communication.ledger import SerializedBytes, break_even, is_soft_label
from fedkd.core.communication.replies import Expected, Failure, excluded
from fedkd.core.communication.validation import largest, validate_update
from fedkd.core.errors import RunError, last_line
from fedkd.core.report.rows import Row
from fedkd.core.tensors import numel
from fedkd.data import skew
from fedkd.simulate.evaluation import per_client, stopping

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Update
    from fedkd.core.tensors import Tensors
    from fedkd.data.readers import Images
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.rounds import Exchange, Round


#: The quality of the ensemble of a round. Soft labels have the temperature that the method gives them.
TEACHER = ("teacher_accuracy", "teacher_entropy", "teacher_ece", "teacher_agreement")


@dataclass(frozen=True)
class ClientEvaluation:
    """The participants' own models on the sample of the test set (``clients``), and the quality of their ensemble.

    ``test_accuracy`` is their mean on all test images, if there is no global student. ``teacher`` has the keys of
    `TEACHER`, or none. ``failures`` are of clients that are left out of both; a client whose model diverged is left out
    of the ensemble only.
    """

    test_accuracy: float | None
    teacher: Mapping[str, float]
    clients: Sequence[Row]
    serialized: SerializedBytes
    failures: Sequence[Failure] = ()

    @property
    def client_accuracy(self) -> float | None:
        """The mean accuracy on the sample."""
        return per_client.summary(self.clients)["client_accuracy"]


def predict_student(experiment: Experiment, state: Tensors, images: Images) -> Tensor | None:
    """The logits of the global student, if the method has one."""
    setup = experiment.setup
    weights = experiment.algorithm.global_model(setup, state)
    return setup.trainer.predict(setup.student, weights, images.pixels) if weights else None


def evaluate_student(
    experiment: Experiment, round_: Round, images: Images
) -> tuple[tuple[float, float] | None, Tensor | None]:
    """Accuracy and loss of the global student, and its logits, if the method has one."""
    from fedkd.training import loop

    logits = predict_student(experiment, round_.state, images)
    if logits is None:
        return None, None
    accuracy, loss = loop.score(logits, images.labels)
    if not math.isfinite(loss):
        raise RunError(
            f"Round {round_.number}: the student of {experiment.config.algorithm} has diverged; "
            "lower --distill-learning-rate or --learning-rate, or raise --temperature. " + largest(round_.updates)
        )
    return (accuracy, loss), logits


def expected_evaluation(experiment: Experiment) -> Expected:
    """What a client's reply to a request for evaluation holds."""
    names = ("accuracy", "loss", *(per_client.LOCAL if experiment.config.local_test else ()))
    return Expected({"logits": 4 * len(experiment.client_test) * experiment.setup.classes}, names)


def evaluate_clients(experiment: Experiment, exchange: Exchange, round_: Round) -> ClientEvaluation:
    """Evaluate the participants' own models and their ensemble on test images.

    This measures the simulation and is not part of a method, so its bytes are counted separately.
    """
    images, sample = experiment.client_test, experiment.test_sample
    declared = {"logits": (len(images), experiment.setup.classes)}
    message = experiment.algorithm.evaluation_message(experiment.setup, round_.state)
    messages: dict[int, Tensors] = dict.fromkeys(round_.updates, message)
    expected = dict.fromkeys(messages, expected_evaluation(experiment))
    replies = sorted(exchange("evaluate", round_.number, messages, expected), key=lambda r: r.client)
    serialized = sum((reply.serialized for reply in replies), SerializedBytes())
    evaluated: dict[int, Update] = {}
    reasons = dict.fromkeys(messages, ("no reply", "no reply"))
    for reply in replies:
        reasons[reply.client] = reply.cause, reply.failure or "sent no logits"
        if reply.update is None:
            continue
        local = per_client.fault(reply.update.metrics)
        reasons[reply.client] = "refused", validate_update(replace(reply.update, metrics={}), declared) or local
        shapes = {name: tuple(tensor.shape) for name, tensor in reply.update.tensors.items()}
        if shapes == declared and not local:
            evaluated[reply.client] = reply.update
    failures = [Failure(client, *reason) for client, reason in reasons.items() if reason[1]]
    usable = [client for client in evaluated if not reasons[client][1]]
    labels = images.labels[sample]
    logits = {client: update.tensors["logits"] for client, update in evaluated.items()}
    teacher: dict[str, float] = {}
    if usable:
        weights = experiment.setup.distillation.client_weights([round_.updates[c].examples for c in usable])
        sampled = [logits[client][sample] for client in usable]
        probs = experiment.algorithm.teacher_probs(experiment.setup, sampled, weights)
        teacher = teacher_quality(probs, sampled, labels)
    entries = [
        per_client.entry(client, round_.updates[client].examples, logits[client][sample], labels, update.metrics)
        for client, update in evaluated.items()
    ]
    entries = per_client.with_student(experiment, round_, entries)
    mean = fmean(_accuracy(each, images.labels) for each in logits.values()) if logits else None
    return ClientEvaluation(mean, teacher, entries, serialized, failures)


def teacher_quality(probs: Tensor, logits: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Of soft labels [N, C] that were made of the logits [N, C] of clients: the values of `TEACHER`.

    Accuracy; mean entropy (nats); expected calibration error; and the share of the clients' predictions that are those
    of the teacher.
    """
    from fedkd.training import quality

    known = probs.double()
    scores = known.clamp_min(1e-300).log()
    entropy = -(known * scores).sum(-1).mean().item()
    agreement = fmean(quality.agreement(known, each) for each in logits)
    return dict(zip(TEACHER, (_accuracy(probs, labels), entropy, quality.ece(scores, labels), agreement), strict=True))


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return per_client.is_right(scores, labels).double().mean().item()


def round_row(
    experiment: Experiment,
    round_: Round,
    student: tuple[float, float] | None,
    clients: ClientEvaluation | None,
    validation: tuple[float, float] | None = None,
) -> Row:
    """A line of ``rounds.jsonl``, without the times (keys: docs/output-files.md).

    If a method has no global student, the mean accuracy of the clients' own models on all test images is the test
    accuracy.

    Raises:
        RunError: all of these have diverged.

    """
    config = experiment.config
    if student is None and clients and clients.client_accuracy is not None and not clients.teacher:
        raise RunError(
            f"Round {round_.number}: the models of {config.algorithm} have all diverged; lower --learning-rate."
        )
    accuracy, loss = student or (clients.test_accuracy if clients else None, None)
    evaluation = clients.serialized if clients else SerializedBytes()
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "round": round_.number,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "validation_accuracy": validation[0] if validation else None,
        "validation_loss": validation[1] if validation else None,
        **{key: clients.teacher.get(key) if clients else None for key in TEACHER},
        **per_client.summary(clients.clients if clients else ()),
        "uplink_serialized_bytes": round_.serialized.uplink_arrays,
        "downlink_serialized_bytes": round_.serialized.downlink_arrays,
        "uplink_float32_bytes": round_.uplink.float32,
        "downlink_float32_bytes": round_.downlink.float32,
        "uplink_encoded_bytes": round_.uplink.encoded,
        "downlink_encoded_bytes": round_.downlink.encoded,
        "uplink_entropy_bound_bytes": round(round_.uplink.entropy_bound, 1),
        "downlink_entropy_bound_bytes": round(round_.downlink.entropy_bound, 1),
        "uplink_metadata_bytes": round_.serialized.uplink_metadata,
        "downlink_metadata_bytes": round_.serialized.downlink_metadata,
        "evaluation_bytes": evaluation.uplink_arrays + evaluation.downlink_arrays,
        "participants": len(round_.updates),
        "attempts": round_.attempts,
        "simulated_duration": None if round_.duration is None else round(round_.duration, 5),
        "failures": _listed(round_.failures),
        "evaluation_failures": _listed(clients.failures if clients else ()),
        "clients": clients.clients if clients else [],
        "excluded": sorted(excluded(round_.refusals, config.exclude_after)),
        "train_metrics": _mean_metrics(round_),
    }


def _listed(failures: Iterable[Failure]) -> list[Row]:
    return [{"client": each.client, "cause": each.cause, "reason": last_line(each.reason)} for each in failures]


def _mean_metrics(round_: Round) -> dict[str, float]:
    names = sorted({name for update in round_.updates.values() for name in update.metrics})
    return {n: fmean(u.metrics[n] for u in round_.updates.values() if n in u.metrics) for n in names}


def run_summary(experiment: Experiment, rows: Sequence[Row], partition_sha256: str) -> Row:
    """One entry of ``runs`` in ``result.json``: the totals of its rounds, and what the experiment adds."""
    skewed = partition_skew(experiment)
    return {
        "algorithm": experiment.config.algorithm,
        "seed": experiment.config.seed,
        **totals(rows),
        "ended": stopping.ended(experiment.config, rows),
        "clients": experiment.config.clients,
        "test_samples": len(experiment.test),
        "client_test_samples": len(experiment.test_sample),
        "break_even_proxy_size": _break_even(experiment, rows),
        "partition_distance": None if skewed is None else round(skewed.distance, 6),
        "partition_sha256": partition_sha256,
    }


def totals(rows: Sequence[Row]) -> Row:
    """What the rows of a method and seed give of its summary, also if it has not ended."""

    def total(*keys: str) -> Any:
        return sum(row[key] for row in rows for key in keys)

    last5, last = [row["test_accuracy"] for row in rows[-5:] if row["test_accuracy"] is not None], rows[-1]
    best = stopping.best(rows) or dict.fromkeys(("round", "validation_accuracy", "test_accuracy"))
    return {
        "rounds": len(rows),
        "evaluated_model": "clients" if last["test_loss"] is None else "student",
        "test_accuracy": last["test_accuracy"],
        "test_accuracy_last5": fmean(last5) if len(last5) == len(rows[-5:]) else None,
        "test_loss": last["test_loss"],
        "best_round": best["round"],
        "best_validation_accuracy": best["validation_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "largest_test_accuracy": max((a for row in rows if (a := row["test_accuracy"]) is not None), default=None),
        "teacher_accuracy": last["teacher_accuracy"],
        **{key: last.get(key) for key in per_client.KEYS},
        "uplink_serialized_bytes": total("uplink_serialized_bytes"),
        "downlink_serialized_bytes": total("downlink_serialized_bytes"),
        "float32_bytes": total("uplink_float32_bytes", "downlink_float32_bytes"),
        "encoded_bytes": total("uplink_encoded_bytes", "downlink_encoded_bytes"),
        "entropy_bound_bytes": round(
            sum(row["uplink_entropy_bound_bytes"] + row["downlink_entropy_bound_bytes"] for row in rows), 1
        ),
        "metadata_bytes": total("uplink_metadata_bytes", "downlink_metadata_bytes"),
        "evaluation_bytes": total("evaluation_bytes"),
        "failures": sum(len(row["failures"]) for row in rows),
        "failure_causes": dict(Counter(failure["cause"] for row in rows for failure in row["failures"])),
        "excluded": last["excluded"],
        "evaluation_failures": sum(len(row["evaluation_failures"]) for row in rows),
        "training_seconds": total("training_seconds"),
        "evaluation_seconds": total("evaluation_seconds"),
    }


def partition_skew(experiment: Experiment) -> skew.Skew | None:
    """The skew of the clients' shares; None if they bring their own data."""
    if not len(experiment.partition.rows):
        return None
    held_out = len(experiment.validation_rows) + len(experiment.local_tests.rows)
    held_out += 0 if experiment.proxy_rows is None else len(experiment.proxy_rows)
    private = len(experiment.train) - held_out
    return skew.measure(experiment.train.labels.numpy(), experiment.partition, experiment.setup.classes, private)


def _break_even(experiment: Experiment, rows: Sequence[Row]) -> int | None:
    """The number of proxy samples at which the uplink takes as many bytes as the student's weights in float32.

    By the mean of the encoded bytes per sample; None if no soft labels are uploaded.
    """
    setup, algorithm = experiment.setup, experiment.algorithm
    encoded = sum(row["uplink_encoded_bytes"] for row in rows)
    samples = setup.logits_shape[0] * sum(row["participants"] for row in rows)
    names = algorithm.upload_spec(setup, 0, 1)
    if not encoded or not any(is_soft_label(name) for name in names):
        return None
    label_bits = 8 * encoded / samples / setup.classes
    return int(break_even(numel(setup.trainer.initial_weights(setup.student)), 32, setup.classes, label_bits))
