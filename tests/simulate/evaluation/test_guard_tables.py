"""Bytes to a common accuracy, the tables, and the ensemble of a round, against numbers computed by hand."""

from __future__ import annotations

import dataclasses

import torch

from fedkd.algorithms.base import Update
from fedkd.algorithms.local import Local
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Failure, Reply
from fedkd.core.report import table
from fedkd.core.report.rows import common_accuracy, sent, until
from fedkd.simulate.evaluation import metrics
from fedkd.simulate.experiment import prepare
from fedkd.simulate.rounds import Round
from tests.conftest import tiny

# Bytes to a common accuracy, and the ledger.


def curve(*rounds):
    """Rows from (accuracy, uplink bytes, downlink bytes)."""
    return [
        {"test_accuracy": a, "uplink_serialized_bytes": up, "downlink_serialized_bytes": down} for a, up, down in rounds
    ]


def bytes_to(accuracy, rows):
    """Bytes in both directions until an accuracy is reached."""
    reached = until(accuracy, rows)
    return None if reached is None else sent(reached)


def test_the_common_accuracy_is_the_least_of_the_best_ones():
    peaked = curve((0.2, 1, 1), (0.7, 1, 1), (0.4, 1, 1))
    rising = curve((0.3, 1, 1), (0.5, 1, 1), (0.8, 1, 1))
    low, no_uplink, not_evaluated = curve((0.45, 0, 1)), curve((0.1, 0, 9)), curve((None, 1, 1), (0.2, 1, 1))
    assert common_accuracy([peaked, rising]) == 0.7, "the best round of a curve, not the last"
    assert common_accuracy([rising, peaked]) == 0.7
    assert common_accuracy([rising]) == 0.8
    assert common_accuracy([peaked, low, no_uplink, not_evaluated]) == 0.7, "without an uplink it does not count"
    late = curve((0.1, 0, 0), (0.6, 5, 0))
    assert common_accuracy([peaked, rising, late]) == 0.6, "with an uplink in some round it does"
    assert common_accuracy([no_uplink, not_evaluated]) is None
    assert common_accuracy([]) is None


def test_bytes_until_an_accuracy_is_first_reached():
    rows = curve((0.2, 1, 10), (0.6, 100, 1000), (0.4, 10_000, 100_000), (0.7, 10**6, 10**7))
    assert bytes_to(0.1, rows) == bytes_to(0.2, rows) == 11
    assert bytes_to(0.21, rows) == bytes_to(0.5, rows) == bytes_to(0.6, rows) == 1111
    assert bytes_to(0.61, rows) == bytes_to(0.7, rows) == 11_111_111
    assert bytes_to(0.71, rows) is None
    gap = curve((0.2, 1, 10), (None, 100, 1000), (0.6, 10_000, 100_000))
    assert bytes_to(0.2, gap) == 11
    assert bytes_to(0.6, gap) is None
    assert bytes_to(0.2, []) is None


def finished(name, seed, **changes):
    """A summary as a table reads it."""
    held = {"algorithm": name, "seed": seed, "float32_bytes": 400, "entropy_bound_bytes": 100.0, "encoded_bytes": 200}
    held |= {
        "uplink_serialized_bytes": 250,
        "downlink_serialized_bytes": 50,
        "break_even_proxy_size": 40,
        "evaluation_bytes": 10**9,
        "metadata_bytes": 10**9,
    }
    return {**held, **changes}


def test_the_ledger_has_means_over_seeds():
    runs = [
        finished("a", 0),
        finished(
            "b",
            0,
            float32_bytes=7,
            entropy_bound_bytes=5.0,
            encoded_bytes=6,
            uplink_serialized_bytes=8,
            downlink_serialized_bytes=1,
            break_even_proxy_size=None,
        ),
        finished(
            "a",
            1,
            float32_bytes=600,
            entropy_bound_bytes=140.0,
            encoded_bytes=260,
            uplink_serialized_bytes=350,
            downlink_serialized_bytes=70,
            break_even_proxy_size=45,
        ),
        finished(
            "a",
            2,
            float32_bytes=500,
            entropy_bound_bytes=120.0,
            encoded_bytes=230,
            uplink_serialized_bytes=300,
            downlink_serialized_bytes=60,
            break_even_proxy_size=None,
        ),
    ]
    grid = table.ledger(runs)
    assert list(grid.titles) == ["method", "float32", "entropy bound", "encoded", "serialized", "break-even"]
    assert [list(row) for row in grid.rows] == [
        ["a", "500 B", "120 B", "230 B", "360 B", "42"],
        ["b", "7 B", "5 B", "6 B", "9 B", "–"],
    ]


def test_the_columns_of_the_table_are_those_of_the_summaries():
    shares = {"test_accuracy": 0.1, "test_accuracy_last5": 0.2, "teacher_accuracy": 0.3, "client_accuracy": 0.4}
    more = {
        "uplink_serialized_bytes": 1000,
        "downlink_serialized_bytes": 2000,
        "training_seconds": 5.0,
        "evaluation_seconds": 70.0,
        "evaluated_model": "student",
    }
    runs = [{"algorithm": "a", "seed": 0, **shares, **more}]
    curves = {
        ("a", 0): [
            {"round": 1, "test_accuracy": 0.1, "uplink_serialized_bytes": 1000, "downlink_serialized_bytes": 2000}
        ]
    }
    grid = table.side_by_side(runs, curves)
    assert dict(zip(grid.titles, grid.rows[0], strict=True)) == {
        "method": "a",
        "test acc": "10.0%",
        "last 5": "20.0%",
        "teacher": "30.0%",
        "clients": "40.0%",
        "uplink": "1 kB",
        "downlink": "2 kB",
        "training": "5.0 s",
        "evaluation": "70.0 s",
    }


class First(Local):
    """A method whose teacher is its first client."""

    def teacher_probs(self, setup, logits, weights):
        return logits[0].softmax(-1)


def test_the_ensemble_is_weighted_by_numbers_of_samples_with_weighting_size():
    """Two of three replies count; the logits of a client that fails are in neither number."""
    experiment = prepare(tiny())
    labels = experiment.test.labels
    right = 4.0 * torch.nn.functional.one_hot(labels, 10).float()
    wrong = right.roll(1, -1)
    round_ = Round(
        1,
        {},
        updates={c: Update({}, n) for c, n in ((0, 10), (1, 90), (2, 5))},
        failures=[],
        serialized=SerializedBytes(),
        downlink=Traffic(),
        uplink=Traffic(),
    )

    def exchange(kind, number, requests, expected=None):
        assert (kind, number, set(requests)) == ("evaluate", 1, {0, 1, 2})
        yield Reply(1, Update({"logits": wrong}, 1), "", SerializedBytes(1, 1, 1, 1))
        yield Reply(2, None, "out of memory", SerializedBytes(1, 0, 1, 0))
        yield Reply(0, Update({"logits": 2 * right}, 1), "", SerializedBytes(1, 1, 1, 1))

    by_size = dataclasses.replace(experiment.setup.distillation, weighting="size")
    weighted = dataclasses.replace(experiment, setup=dataclasses.replace(experiment.setup, distillation=by_size))
    uniform, sized = (metrics.evaluate_clients(one, exchange, round_) for one in (experiment, weighted))
    assert uniform.client_accuracy == sized.client_accuracy == 0.5
    assert (uniform.teacher["teacher_accuracy"], sized.teacher["teacher_accuracy"]) == (1.0, 0.0)
    assert uniform.serialized == SerializedBytes(3, 2, 3, 2)
    assert uniform.failures == [Failure(2, "error", "out of memory")]
    first = metrics.evaluate_clients(dataclasses.replace(experiment, algorithm=First()), exchange, round_)
    assert first.teacher["teacher_accuracy"] == 1.0, (
        "logits are in the order of clients, in whichever order replies arrive"
    )
