"""What is measured after a round, and what is said of a run at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedkd.communication.channel import break_even, is_soft_label
from fedkd.core.errors import RunError
from fedkd.core.tensors import numel
from fedkd.simulate.rounds import Round, Traffic, last_line, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors
    from fedkd.simulate.experiment import Experiment
    from fedkd.simulate.rounds import Exchange

Row = dict[str, Any]


@dataclass(frozen=True)
class Ensemble:
    """The participants' own models on the test set: their mean, and the teacher they make.

    ``failures`` are those that count for neither, or, diverged, for the mean only; and why.
    """

    client_accuracy: float | None
    teacher_accuracy: float | None
    traffic: Traffic
    failures: Mapping[int, str] = field(default_factory=dict)


def student(experiment: Experiment, round_: Round) -> tuple[float, float] | None:
    """Test accuracy and loss of the global student, if the method has one."""
    from fedkd.training import loop

    kit = experiment.kit
    weights = experiment.algorithm.deploy(kit, round_.state)
    if not weights:
        return None
    accuracy, loss = loop.score(kit.predict(kit.student, weights, experiment.test.pixels), experiment.test.labels)
    if not math.isfinite(loss):
        raise RunError(
            f"Round {round_.number}: the student of {experiment.config.algorithm} has diverged; "
            "lower --distill-learning-rate or --learning-rate, or raise --temperature."
        )
    return accuracy, loss


def ensemble(experiment: Experiment, exchange: Exchange, round_: Round) -> Ensemble:
    """Ask the round's participants how their models do on the test set.

    A yardstick of the simulation: its traffic is kept apart from the method's.
    """
    declared = {"logits": (len(experiment.test), experiment.kit.classes)}
    requests: dict[int, Tensors] = {client: {} for client in round_.updates}
    replies = sorted(exchange("evaluate", round_.number, requests), key=lambda r: r.client)
    traffic = sum((reply.traffic for reply in replies), Traffic())
    answered: dict[int, Tensor] = {}
    failures = dict.fromkeys(requests, "no reply")
    for reply in replies:
        failures[reply.client] = reply.failure or "no answers"
        if reply.update is not None and {n: (*t.shape,) for n, t in reply.update.tensors.items()} == declared:
            answered[reply.client] = reply.update.tensors["logits"]
            failures[reply.client] = refusal(replace(reply.update, metrics={}), declared)
    failures = {client: reason for client, reason in failures.items() if reason}
    fine = [client for client in answered if client not in failures]

    def accuracy(scores: Tensor) -> float:
        right = (scores.argmax(-1) == experiment.test.labels) & scores.isfinite().all(-1)
        return right.double().mean().item()

    teacher = None
    if fine:
        weights = experiment.kit.votes([round_.updates[client].examples for client in fine])
        teacher = accuracy(experiment.algorithm.teacher(experiment.kit, [answered[c] for c in fine], weights))
    mean = fmean(map(accuracy, answered.values())) if answered else None  # whoever diverged is wrong, and counts
    return Ensemble(mean, teacher, traffic, failures)


def row(experiment: Experiment, round_: Round, scores: tuple[float, float] | None, members: Ensemble | None) -> Row:
    """A line of ``rounds.jsonl``, but for the times.

    Where a method has no global student, what it deploys are the clients' own models: their mean
    accuracy is its test accuracy.

    Raises:
        RunError: all of those have diverged.

    """
    config = experiment.config
    if scores is None and members and members.client_accuracy is not None and members.teacher_accuracy is None:
        raise RunError(
            f"Round {round_.number}: the models of {config.algorithm} have all diverged; lower --learning-rate."
        )
    accuracy, loss = scores or (members.client_accuracy if members else None, None)
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "round": round_.number,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "teacher_accuracy": members.teacher_accuracy if members else None,
        "client_accuracy": members.client_accuracy if members else None,
        "bytes_up": round_.traffic.arrays_up,
        "bytes_down": round_.traffic.arrays_down,
        "raw_bytes_up": round_.up.raw,
        "raw_bytes_down": round_.down.raw,
        "coded_bytes_up": round_.up.coded,
        "coded_bytes_down": round_.down.coded,
        "entropy_bytes_up": round(round_.up.bound, 1),
        "entropy_bytes_down": round(round_.down.bound, 1),
        "config_bytes_up": round_.traffic.rest_up,
        "config_bytes_down": round_.traffic.rest_down,
        "evaluation_bytes": members.traffic.arrays_up + members.traffic.arrays_down if members else 0,
        "participants": len(round_.updates),
        "failures": _said(round_.failures),
        "evaluation_failures": _said(members.failures if members else {}),
        "train_metrics": _mean_metrics(round_),
    }


def _said(failures: Mapping[int, str]) -> dict[str, str]:
    return {str(client): last_line(reason) for client, reason in failures.items()}


def _mean_metrics(round_: Round) -> dict[str, float]:
    names = sorted({name for update in round_.updates.values() for name in update.metrics})
    return {n: fmean(u.metrics[n] for u in round_.updates.values() if n in u.metrics) for n in names}


def summary(experiment: Experiment, rows: Sequence[Row], partition_sha256: str) -> Row:
    """One entry of ``runs`` in the result."""
    last = [r["test_accuracy"] for r in rows[-5:] if r["test_accuracy"] is not None]
    config = experiment.config
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "rounds": len(rows),
        "clients": config.clients,
        "deploys": "clients" if rows[-1]["test_loss"] is None else "student",
        "test_accuracy": rows[-1]["test_accuracy"],
        "test_accuracy_last5": fmean(last) if len(last) == len(rows[-5:]) else None,
        "test_loss": rows[-1]["test_loss"],
        "teacher_accuracy": rows[-1]["teacher_accuracy"],
        "client_accuracy": rows[-1]["client_accuracy"],
        "bytes_up": sum(r["bytes_up"] for r in rows),
        "bytes_down": sum(r["bytes_down"] for r in rows),
        "raw_bytes": sum(r["raw_bytes_up"] + r["raw_bytes_down"] for r in rows),
        "coded_bytes": sum(r["coded_bytes_up"] + r["coded_bytes_down"] for r in rows),
        "entropy_bytes": round(sum(r["entropy_bytes_up"] + r["entropy_bytes_down"] for r in rows), 1),
        "break_even": _break_even(experiment, rows),
        "config_bytes": sum(r["config_bytes_up"] + r["config_bytes_down"] for r in rows),
        "evaluation_bytes": sum(r["evaluation_bytes"] for r in rows),
        "failures": sum(len(r["failures"]) for r in rows),
        "evaluation_failures": sum(len(r["evaluation_failures"]) for r in rows),
        "seconds": sum(r["seconds"] for r in rows),
        "evaluation_seconds": sum(r["evaluation_seconds"] for r in rows),
        "partition_sha256": partition_sha256,
    }


def _break_even(experiment: Experiment, rows: Sequence[Row]) -> int | None:
    """The number of proxy images at which what went up is as much as the student's weights in float32.

    By the coded bytes that an image cost on average; None where no soft labels went up.
    """
    kit, algorithm = experiment.kit, experiment.algorithm
    coded = sum(row["coded_bytes_up"] for row in rows)
    images = kit.answers()[0] * sum(row["participants"] for row in rows)
    if not coded or not any(is_soft_label(name) for name in algorithm.sends(kit, algorithm.init(kit), 0)):
        return None
    label_bits = 8 * coded / images / kit.classes
    return int(break_even(numel(kit.initial(kit.student)), 32, kit.classes, label_bits))


def common_accuracy(curves: Sequence[Sequence[Row]]) -> float | None:
    """The best test accuracy that every method that communicates reached in some round.

    Of those that are measured in every round: with ``evaluate_every`` above 1 methods without a student are not.
    """
    peaks = []
    for rows in curves:
        reached = [r["test_accuracy"] for r in rows]
        if any(r["bytes_up"] for r in rows) and None not in reached:
            peaks.append(max(reached))
    return min(peaks) if peaks else None


def bytes_to(accuracy: float, rows: Sequence[Row]) -> int | None:
    """Bytes up and down until a run's test accuracy first reaches ``accuracy``.

    None if it never does, or if a round before was not measured.
    """
    total: int = 0
    for line in rows:
        total += int(line["bytes_up"] + line["bytes_down"])
        if line["test_accuracy"] is None:
            return None
        if line["test_accuracy"] >= accuracy:
            return total
    return None
