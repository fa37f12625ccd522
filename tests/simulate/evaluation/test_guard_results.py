"""The saved student, and every number of a summary against one computed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedkd.algorithms.base import Update
from fedkd.core import tensors
from fedkd.core.communication.ledger import SerializedBytes, Traffic, break_even
from fedkd.core.communication.replies import Failure
from fedkd.simulate.evaluation import metrics, per_client
from fedkd.simulate.evaluation.metrics import ClientEvaluation
from fedkd.simulate.experiment import prepare
from fedkd.simulate.rounds import Round
from fedkd.training import loop
from tests.conftest import simulated, tiny

SPOILED = """
from dataclasses import dataclass
from fedkd.algorithms.fedavg import FedAvg
from fedkd.core.tensors import integer, put, take
from fedkd.core.communication.replies import Failure

@dataclass(frozen=True)
class Spoiled(FedAvg):
    # In the last round the global model is negated.
    def initial_state(self, setup):
        return {"round": integer(1), **put("model", setup.trainer.initial_weights(setup.student))}

    def broadcast(self, setup, state, client):
        return take("model", state)

    def aggregate(self, setup, state, updates, seed):
        new = super().aggregate(setup, state, updates, seed)
        if int(state["round"]) == setup.config.rounds:
            new = {name: -tensor for name, tensor in new.items()}
        return {"round": state["round"] + 1, **put("model", new)}

    def global_model(self, setup, state):
        return take("model", state)
"""


def written(out) -> dict:
    """The first run in the result."""
    return json.loads((out / "result.json").read_text())["runs"][0]


# The saved student.


def test_the_student_of_the_last_round_is_saved_and_not_the_best_one(tmp_path):
    (tmp_path / "mine.py").write_text(SPOILED)
    out = tmp_path / "run"
    rows = simulated(out, algorithm=f"{tmp_path / 'mine.py'}:Spoiled", rounds=4, learning_rate=0.05)
    reached = [row["test_accuracy"] for row in rows]
    best = max(reached)
    assert reached[-1] < min(best, reached[-2]), (
        "the premise: the last round is neither the best nor like the one before"
    )
    assert best > reached[0], "the first round is not the best either"
    experiment = prepare(tiny())
    saved = tensors.load(out / "student.safetensors")
    logits = experiment.setup.trainer.predict("cnn:width=8", saved, experiment.test.pixels)
    accuracy, loss = loop.score(logits, experiment.test.labels)
    assert accuracy == pytest.approx(reached[-1], abs=1e-9)
    assert loss == pytest.approx(rows[-1]["test_loss"], rel=1e-5)
    summary = written(out)
    for key in ("test_accuracy", "test_loss", "teacher_accuracy", "client_accuracy"):
        assert summary[key] == rows[-1][key]
        assert rows[-1][key] != rows[-2][key]
    assert summary["test_accuracy_last5"] == pytest.approx(sum(reached) / 4)


def test_the_last_round_is_always_evaluated_and_what_is_not_evaluated_is_none(tmp_path):
    options = {"rounds": 3, "evaluate_every": 2, "model": "cnn:width=4"}
    rows = simulated(tmp_path / "run", algorithm="fedmd", compare="ensemble local central", **options)
    runs = {run["algorithm"]: run for run in json.loads((tmp_path / "run" / "result.json").read_text())["runs"]}
    for name, run in runs.items():
        mine = [row for row in rows if row["algorithm"] == name]
        for key in ("teacher_accuracy", "client_accuracy"):
            assert [row[key] is None for row in mine] == [True, False, False]
            assert run[key] == mine[-1][key]
        is_student = name == "ensemble"
        assert [row["test_accuracy"] is None for row in mine] == [not is_student, False, False]
        assert run["evaluated_model"] == ("student" if is_student else "clients")
        assert (run["test_accuracy_last5"] is None) is not is_student
        if not is_student:
            assert [row["test_accuracy"] for row in mine] == [row["client_accuracy"] for row in mine]
    assert len({run["partition_sha256"] for run in runs.values()}) == 1, (
        "the partition of the clients, for pooled data too"
    )


# The summary of a run.


KEYS = (
    "uplink_serialized_bytes",
    "downlink_serialized_bytes",
    "uplink_float32_bytes",
    "downlink_float32_bytes",
    "uplink_encoded_bytes",
    "downlink_encoded_bytes",
)
KEYS += ("uplink_metadata_bytes", "downlink_metadata_bytes", "evaluation_bytes")


def line(number: int, accuracy: float | None, **changes) -> dict:
    """A row of a round with different numbers everywhere."""
    sizes = {key: number * 10**place for place, key in enumerate(KEYS)}
    return {
        "round": number,
        "test_accuracy": accuracy,
        "test_loss": 2.0 + number,
        "teacher_accuracy": 0.01 * number,
        "client_accuracy": 0.001 * number,
        **sizes,
        "uplink_entropy_bound_bytes": 0.1 * number,
        "downlink_entropy_bound_bytes": 10.2 * number,
        "participants": 3,
        "failures": [],
        "evaluation_failures": [],
        "excluded": [],
        "training_seconds": 0.5 * number,
        "evaluation_seconds": 100.0 * number,
        **changes,
    }


def failed(client: int, cause: str) -> dict:
    return {"client": client, "cause": cause, "reason": "a reason"}


ACCURACIES = [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.6]
VALIDATION = [None, 0.7, 0.1, 0.2, 0.8, 0.8, 0.6]


def summarized(experiment, accuracies):
    return metrics.run_summary(experiment, [line(n, a) for n, a in enumerate(accuracies, 1)], "sha")


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        (ACCURACIES, 1.6 / 5),
        (ACCURACIES[:5], 2.3 / 5),
        (ACCURACIES[:3], 1.8 / 3),
        ([0.7], 0.7),
        ([None, None, *ACCURACIES[2:]], 1.6 / 5),
        ([0.9, 0.8, None, 0.2, 0.3, 0.4, 0.6], None),
        ([0.9, 0.8, 0.1, 0.2, None, 0.4, 0.6], None),
        ([0.9, 0.8, 0.1, 0.2, 0.3, 0.4, None], None),
        ([None, 0.5], None),
        ([0.0] * 5, 0.0),
    ],
)
def test_last5_is_the_mean_of_the_last_five_rounds_if_all_were_evaluated(experiment, accuracies, expected):
    summary = summarized(experiment, accuracies)
    last5 = summary["test_accuracy_last5"]
    assert last5 is None if expected is None else last5 == pytest.approx(expected, abs=1e-12)
    assert summary["test_accuracy"] == accuracies[-1]


def test_every_number_of_a_summary_by_hand():
    """Seven rounds: their numbers add up to 28."""
    experiment = prepare(tiny(algorithm="fedavg", clients=6, participation=0.5, seed=3))
    rows = [line(number, accuracy) for number, accuracy in enumerate(ACCURACIES, 1)]
    rows[1] = {**rows[1], "failures": [failed(0, "no reply"), failed(4, "died")]}
    rows[1]["evaluation_failures"] = [failed(1, "no reply")]
    rows[6] = {**rows[6], "failures": [failed(2, "no reply")], "excluded": [5]}
    rows = [{**row, "validation_accuracy": value} for row, value in zip(rows, VALIDATION, strict=True)]
    assert metrics.run_summary(experiment, rows, "sha256 of the partition") == {
        "algorithm": "fedavg",
        "seed": 3,
        "rounds": 7,
        "ended": "rounds",
        "clients": 6,
        "test_samples": 359,
        "client_test_samples": 359,
        "evaluated_model": "student",
        "test_accuracy": 0.6,
        "test_accuracy_last5": pytest.approx(0.32),
        "test_loss": 9.0,
        "best_round": 5,
        "best_validation_accuracy": 0.8,
        "best_test_accuracy": 0.3,
        "largest_test_accuracy": 0.9,
        "teacher_accuracy": pytest.approx(0.07),
        "client_accuracy": pytest.approx(0.007),
        **dict.fromkeys(per_client.KEYS[1:]),
        "uplink_serialized_bytes": 28,
        "downlink_serialized_bytes": 280,
        "float32_bytes": 2800 + 28_000,
        "encoded_bytes": 280_000 + 2_800_000,
        "entropy_bound_bytes": 288.4,
        "break_even_proxy_size": None,
        "metadata_bytes": 28_000_000 + 280_000_000,
        "evaluation_bytes": 2_800_000_000,
        "failures": 3,
        "failure_causes": {"no reply": 2, "died": 1},
        "excluded": [5],
        "evaluation_failures": 1,
        "training_seconds": 14.0,
        "evaluation_seconds": 2800.0,
        "partition_distance": distance_by_hand(experiment),
        "partition_sha256": "sha256 of the partition",
    }


def distance_by_hand(experiment) -> float:
    """Half the sum of the absolute differences of two class distributions, as a mean over the clients."""
    labels = experiment.train.labels.tolist()
    everyone = [labels[row] for part in experiment.partition for row in part]
    distances = []
    for part in experiment.partition:
        own = [labels[row] for row in part]
        shares = ((own.count(c) / len(own), everyone.count(c) / len(everyone)) for c in range(10))
        distances.append(sum(abs(mine - all_) for mine, all_ in shares) / 2)
    return round(sum(distances) / len(distances), 6)


def test_clients_with_their_own_data_have_no_known_skew():
    experiment = prepare(tiny(partitioner="own"))
    assert metrics.partition_skew(experiment) is None
    assert summarized(experiment, [0.5])["partition_distance"] is None


def test_the_evaluated_model_follows_from_the_last_row(experiment):
    rows = [line(1, 0.5), line(2, 0.6, test_loss=None)]
    assert metrics.run_summary(experiment, rows, "")["evaluated_model"] == "clients"
    assert metrics.run_summary(experiment, rows[:1], "")["evaluated_model"] == "student"


# A row of a round.


def entry(client: int, accuracy: float, local: float | None = None, student: float | None = None) -> dict:
    of_local = {"local_samples": 7, "local_accuracy": local, "local_loss": 1.0, "student_local_accuracy": student}
    return {"client": client, "samples": 50, "accuracy": accuracy, "loss": 2.0, **of_local}


ENTRIES = [entry(0, 0.125), entry(2, 0.375, 0.5, 0.75)]


def test_every_number_of_a_row_by_hand(experiment):
    none = torch.zeros(1)
    updates = {
        0: Update({"x": none}, 5, {"loss": 1.0, "epsilon": 8.0}),
        2: Update({"x": none}, 50, {"loss": 4.0}),
    }
    failures = [Failure(1, "error", "Traceback\n  line\nValueError: no.\n")]
    down, up = Traffic(11, 12, 13.26), Traffic(21, 22, 23.34)
    round_ = Round(
        4,
        {},
        refusals={3: 2, 7: 3, 5: 4},
        updates=updates,
        failures=failures,
        serialized=SerializedBytes(1, 2, 3, 4),
        downlink=down,
        uplink=up,
        attempts=2,
        duration=1.23456789,
    )
    teacher = dict(zip(metrics.TEACHER, (0.75, 1.25, 0.0625, 0.5), strict=True))
    failures = [Failure(2, "refused", "diverged")]
    clients = ClientEvaluation(0.375, teacher, ENTRIES, SerializedBytes(100, 1000, 10, 20), failures)
    row = metrics.round_row(experiment, round_, (0.5, 1.5), clients, (0.125, 2.5))
    assert row == {
        "algorithm": "ensemble",
        "seed": 0,
        "round": 4,
        "test_accuracy": 0.5,
        "test_loss": 1.5,
        "validation_accuracy": 0.125,
        "validation_loss": 2.5,
        "teacher_accuracy": 0.75,
        "teacher_entropy": 1.25,
        "teacher_ece": 0.0625,
        "teacher_agreement": 0.5,
        "client_accuracy": 0.25,
        "client_accuracy_worst": 0.125,
        "client_accuracy_p10": pytest.approx(0.15),
        "client_accuracy_std": 0.125,
        "local_accuracy": 0.5,
        "local_accuracy_worst": 0.5,
        "local_accuracy_p10": 0.5,
        "local_accuracy_std": 0.0,
        "student_local_accuracy": 0.75,
        "uplink_serialized_bytes": 2,
        "downlink_serialized_bytes": 1,
        "uplink_float32_bytes": 21,
        "downlink_float32_bytes": 11,
        "uplink_encoded_bytes": 22,
        "downlink_encoded_bytes": 12,
        "uplink_entropy_bound_bytes": 23.3,
        "downlink_entropy_bound_bytes": 13.3,
        "uplink_metadata_bytes": 4,
        "downlink_metadata_bytes": 3,
        "evaluation_bytes": 1100,
        "participants": 2,
        "attempts": 2,
        "simulated_duration": 1.23457,
        "failures": [{"client": 1, "cause": "error", "reason": "ValueError: no"}],
        "evaluation_failures": [{"client": 2, "cause": "refused", "reason": "diverged"}],
        "clients": ENTRIES,
        "excluded": [5, 7],
        "train_metrics": {"epsilon": 8.0, "loss": 2.5},
    }
    without_student = metrics.round_row(experiment, round_, None, clients)
    assert (without_student["test_accuracy"], without_student["test_loss"]) == (0.375, None)
    assert without_student["client_accuracy"] == 0.25
    not_evaluated = metrics.round_row(experiment, round_, (0.5, 1.5), None)
    assert not_evaluated["teacher_accuracy"] is not_evaluated["client_accuracy"] is None
    assert (not_evaluated["evaluation_bytes"], not_evaluated["evaluation_failures"]) == (0, [])
    assert metrics.round_row(experiment, round_, None, None)["test_accuracy"] is None
    zero = metrics.round_row(experiment, round_, (0.0, 3.0), clients)
    assert (zero["test_accuracy"], zero["test_loss"]) == (0.0, 3.0)


# Break-even: how many proxy images cost as much as the weights.


def weights_of(experiment) -> int:
    """Parameters of the student, counted one by one."""
    return sum(weight.numel() for weight in experiment.setup.trainer.parameter_zeros(experiment.setup.student).values())


def test_break_even_is_weights_times_their_bits_over_classes_times_label_bits():
    assert break_even(600, 32, 10, 16) == 120
    assert break_even(600, 16, 10, 32) == 30
    assert break_even(7, 8, 3, 5) == pytest.approx(56 / 15)


def test_break_even_of_a_run_with_partial_participation_and_a_subset_of_the_proxy():
    """16 of 40 proxy images per round; 3 and 2 of 6 clients: 800 numbers take 1600 bytes, 16 bits each."""
    options = {"model": "cnn:width=8", "student": "cnn:width=4", "proxy_samples": 16, "clients": 6}
    experiment = prepare(tiny(**options, participation=0.5))
    weights = weights_of(experiment)
    assert weights != weights_of(prepare(tiny()))
    others = {"uplink_float32_bytes": 10**6, "downlink_encoded_bytes": 10**7}
    rows = [
        line(1, 0.5, uplink_encoded_bytes=1000, participants=3, **others),
        line(2, 0.5, uplink_encoded_bytes=600, participants=2, failures=[failed(1, "no reply")], **others),
    ]
    assert metrics.run_summary(experiment, rows, "")["break_even_proxy_size"] == int(weights * 32 / (10 * 16))
    third = [
        line(1, 0.5, uplink_encoded_bytes=140, participants=1),
        line(2, 0.5, uplink_encoded_bytes=0, participants=2),
    ]
    label_bits = 8 * 140 / (16 * 3 * 10)
    assert metrics.run_summary(experiment, third, "")["break_even_proxy_size"] == int(weights * 32 / (10 * label_bits))
    no_uplink = [line(1, 0.5, uplink_encoded_bytes=0)]
    assert metrics.run_summary(experiment, no_uplink, "")["break_even_proxy_size"] is None
    whole = prepare(tiny(**{**options, "proxy_samples": 0}))
    assert metrics.run_summary(whole, rows, "")["break_even_proxy_size"] == int(
        weights * 32 / (10 * 8 * 1600 / (40 * 5 * 10))
    )


@pytest.mark.parametrize(
    ("algorithm", "has"), [("dsfl", True), ("fedmd", True), ("fedavg", False), ("fedproto", False)]
)
def test_break_even_is_for_soft_labels_on_the_proxy_only(algorithm, has):
    experiment = prepare(tiny(algorithm=algorithm))
    assert (metrics.run_summary(experiment, [line(1, 0.5)], "")["break_even_proxy_size"] is not None) is has


@pytest.mark.parametrize(("codec", "sent"), [("float32", 16 * 10 * 4), ("float16", 16 * 10 * 2 + 4)])
def test_break_even_of_whole_runs(tmp_path, codec, sent):
    """``sent``: bytes of a client in a round, with the header of the encoding."""
    options = {"clients": 5, "participation": 0.4, "proxy_samples": 16, "model": "cnn:width=4", "evaluate_every": 9}
    rows = simulated(tmp_path / "run", uplink_codec=codec, **options)
    assert [row["participants"] for row in rows] == [2, 2]
    assert [row["uplink_encoded_bytes"] for row in rows] == [2 * sent] * 2
    weights = weights_of(prepare(tiny(**options)))
    assert written(tmp_path / "run")["break_even_proxy_size"] == int(weights * 4 / (sent / 16)), (
        "bytes of the weights, over bytes of an image"
    )


def test_the_quality_of_a_teacher_by_hand():
    """Entropy and calibration error from their formulas, in two bins' worth of images; agreement by counting."""
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    clients = [torch.tensor([[2.0, 0], [2, 0], [2, 0], [2, 0]]), torch.tensor([[2.0, 0], [2, 0], [0, 2], [2, 0]])]
    found = metrics.teacher_quality(probs, clients, labels)
    entropy = 3 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 4
    # 3 images with confidence 0.75, of which 2 are right; one with confidence 1 that is right
    error = 0.75 * abs(2 / 3 - 0.75)
    expected = {"teacher_accuracy": 0.75, "teacher_entropy": entropy, "teacher_ece": error, "teacher_agreement": 7 / 8}
    assert found == pytest.approx(expected)
