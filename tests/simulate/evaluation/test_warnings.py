"""Each warning: the case that it is for, and the nearest case that it is not for."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedkd.core import notes
from fedkd.data.skew import Skew
from fedkd.simulate import simulate
from fedkd.simulate.evaluation import warnings
from fedkd.simulate.experiment import prepare
from tests.conftest import is_interrupted_after, tiny

FACTS = warnings.Facts(10, 1000, 400, True, True, fedavg_bytes=800.0)
CHANCE = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 1000)  # 0.1285


def row(number=1, **values):
    usual = {
        "round": number,
        "test_accuracy": 0.5,
        "test_loss": 1.0,
        "teacher_accuracy": 0.5,
        "client_accuracy": 0.4,
        "participants": 4,
        "failures": [],
        "uplink_encoded_bytes": 4 * 300,
        "downlink_encoded_bytes": 4 * 500,
    }
    return usual | values


def curve(*accuracies, loss=2.3):
    return [row(number, test_accuracy=each, test_loss=loss) for number, each in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("rows", "is_warned"),
    [
        (curve(*[CHANCE - 0.001] * 5), True),
        (curve(0.9, *[0.05] * 5), True),
        (curve(*[CHANCE - 0.001] * 4), False),
        (curve(*[0.1] * 4, CHANCE + 0.001), False),
        (curve(CHANCE + 0.001, *[0.1] * 4), False),
        (curve(*[0.1] * 5, loss=None), False),  # there is no student
    ],
)
def test_a_student_at_chance(rows, is_warned):
    assert bool(warnings.student_at_chance(rows, FACTS)) == is_warned


@pytest.mark.parametrize(
    ("number", "teacher", "clients", "has_teacher", "is_warned"),
    [
        (5, 0.424, 0.5, True, True),  # the standard error on 400 images is 0.025
        (5, 0.426, 0.5, True, False),
        (4, 0.1, 0.5, True, False),
        (5, 0.1, 0.5, False, False),
        (5, None, None, True, False),
    ],
)
def test_a_teacher_worse_than_its_clients(number, teacher, clients, has_teacher, is_warned):
    facts = replace(FACTS, has_teacher=has_teacher)
    rows = [row(number, teacher_accuracy=teacher, client_accuracy=clients)]
    assert bool(warnings.teacher_below_clients(rows, facts)) == is_warned


def test_the_advice_names_the_aggregator_only_where_it_is_used():
    rows = [row(5, teacher_accuracy=0.1, client_accuracy=0.5)]
    assert "--aggregator" in warnings.teacher_below_clients(rows, FACTS)
    assert "--aggregator" not in warnings.teacher_below_clients(rows, replace(FACTS, chooses_aggregator=False))


@pytest.mark.parametrize(
    ("values", "is_warned"),
    [
        ({}, False),  # as many bytes as FedAvg
        ({"uplink_encoded_bytes": 4 * 300 + 4}, True),
        ({"participants": 3, "uplink_encoded_bytes": 3 * 300, "failures": [{"client": 3}]}, False),  # 4 were sent to
    ],
)
def test_more_bytes_than_fedavg(values, is_warned):
    assert bool(warnings.more_than_fedavg([row(**values)], FACTS)) == is_warned


def test_each_law_is_said_once():
    watch = warnings.Watch(FACTS)
    rows = [row(n, test_accuracy=0.1, teacher_accuracy=0.1, uplink_encoded_bytes=9999) for n in range(1, 9)]
    assert [len(watch.see(each)) for each in rows] == [1, 0, 0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("distance", "median", "models", "is_warned"),
    [
        (0.43, 2000, ["resnet8"], True),  # Dirichlet with alpha 0.5 on CIFAR-10
        (0.43, 2000, [], False),
        (0.32, 2000, ["resnet8"], False),
        (0.43, 50, ["resnet8"], False),  # of which 0.18 are expected at random
    ],
)
def test_batch_norm_on_skewed_data(distance, median, models, is_warned):
    skew = Skew(1, median, 9999, distance, 5.0, 1.0)
    assert bool(warnings.batch_norm_on_skewed_data(skew, 10, models)) == is_warned


def test_an_iid_partition_is_not_skewed_however_small_the_shares_are():
    from fedkd.data import skew
    from fedkd.data.partition import Partition

    rng = np.random.default_rng(0)
    for classes, samples in ((10, 8), (100, 30), (100, 500)):
        labels = rng.integers(classes, size=20 * samples)
        partition = Partition.of([np.arange(samples) + samples * client for client in range(20)])
        measured = skew.measure(labels, partition, classes, len(labels))
        assert not warnings.batch_norm_on_skewed_data(measured, classes, ["resnet8"])


def keys(*numbers):
    return np.asarray(numbers, dtype=np.uint64).view("V8")


def test_test_images_in_the_proxy():
    assert "1 of 3 proxy images" in warnings.test_images_in_proxy(keys(1, 2, 3), keys(3, 4))
    assert not warnings.test_images_in_proxy(keys(1, 2, 3), keys(4, 5))


def test_private_images_in_the_proxy():
    proxy = range(200)
    assert warnings.private_images_in_proxy(keys(*proxy), keys(0, 1, 2, 999))
    assert not warnings.private_images_in_proxy(keys(*proxy), keys(0, 1, 999))  # 1%: published sets have as many


# In runs.

TWINS = """
import numpy as np

def twins(split, *, copied: bool = True):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(60, 8, 8), dtype=np.uint8)
    rows = {"train": np.r_[0:50, 0:50] if copied else np.r_[0:40], "test": np.r_[40:60]}[split]
    return [(images[i], int(i) % 2) for i in rows]
"""


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    path = tmp_path_factory.mktemp("twins") / "twins.py"
    path.write_text(TWINS)
    return f"{path}:twins"


def test_copies_are_found_in_a_data_set(twins):
    found = warnings.before(prepare(tiny(dataset=twins, proxy="holdout:size=20")))
    assert ["test images" in found[0], "private images" in found[1]] == [True, True]
    assert not warnings.before(prepare(tiny(dataset=twins, proxy="holdout:size=20", algorithm="fedavg")))
    assert not warnings.before(prepare(tiny(dataset=f"{twins}:copied=false", proxy="holdout:size=20")))
    assert not warnings.before(prepare(tiny(dataset=twins, proxy="noise:size=20")))


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [
        ({}, True),
        ({"norm": "group"}, False),
        ({"partitioner": "iid"}, False),
        ({"algorithm": "local"}, False),
        ({"algorithm": "central"}, False),
    ],
)
def test_batch_norm_in_experiments(changes, is_warned):
    skewed = {"norm": "batch", "partitioner": "pathological:classes=2", "algorithm": "fedavg", **changes}
    found = warnings.before(prepare(tiny(**skewed, clients=5)))
    assert ["--norm group" in text for text in found] == [True] * is_warned


@pytest.mark.parametrize(
    ("algorithm", "has_teacher", "has_limit"),
    [
        *(("ensemble", True, True), ("dsfl", True, True), ("cfd", True, True), ("feddf", True, False)),
        *(("fedavg", False, False), ("fd", False, False), ("local", False, False), ("fedproto", False, False)),
    ],
)
def test_facts_of_methods(algorithm, has_teacher, has_limit):
    facts = warnings.facts(prepare(tiny(algorithm=algorithm)))
    assert (facts.has_teacher, math.isfinite(facts.fedavg_bytes)) == (has_teacher, has_limit)
    assert (facts.classes, facts.test_samples, facts.client_test_samples) == (10, 359, 359)
    if has_limit:
        assert facts.fedavg_bytes == 8 * 6322  # the numbers of cnn:width=8 as float32, to and from the server


def test_warnings_are_in_the_result_once_also_of_a_resumed_run(tmp_path, capsys):
    notes.say.cache_clear()
    options = {"proxy": "holdout:size=1320", "compare": "fedavg", "norm": "batch"}  # more than the weights
    options |= {"partitioner": "pathological:classes=2", "clients": 5}
    out = tmp_path / "run"
    assert is_interrupted_after(2, lambda: simulate(tiny(**options, out=str(out))))
    assert len(json.loads((out / "result.json").read_text())["warnings"]) == 2
    simulate(tiny(**options, out=str(out), resume=str(out)))
    found = json.loads((out / "result.json").read_text())["warnings"]
    kinds = [(each["round"], each["algorithm"], each["seed"]) for each in found]
    assert kinds == [(None, "ensemble", 0), (1, "ensemble", 0), (None, "fedavg", 0)]
    said = capsys.readouterr().err
    assert f"fedkd: ensemble, seed 0, round 1: {found[1]['text']}\n" in said
    assert said.count(found[0]["text"]) == 1  # the same for both methods


UNIFORM, HARD = math.log(FACTS.classes), 0.0


@pytest.mark.parametrize(
    ("entropies", "ece", "has_teacher", "is_uniform", "is_hard"),
    [
        ([0.995 * UNIFORM] * 5, 0.5, True, True, False),
        ([0.995 * UNIFORM] * 5, 0.5, False, False, False),
        ([0.995 * UNIFORM] * 4, 0.5, True, False, False),
        ([0.985 * UNIFORM, *[UNIFORM] * 4], 0.5, True, False, False),
        ([0.009 * UNIFORM] * 5, 0.11, True, False, True),
        ([0.009 * UNIFORM] * 5, 0.09, True, False, False),  # sure, and right
        ([0.009 * UNIFORM] * 5, 0.11, False, False, False),
        ([*[HARD] * 4, 0.011 * UNIFORM], 0.11, True, False, False),
        ([HARD, None, HARD, HARD, HARD], 0.11, True, False, False),  # a round was not evaluated
    ],
)
def test_soft_labels_that_have_collapsed(entropies, ece, has_teacher, is_uniform, is_hard):
    rows = [row(number, teacher_entropy=each, teacher_ece=ece) for number, each in enumerate(entropies, 1)]
    facts = replace(FACTS, has_teacher=has_teacher)
    assert bool(warnings.uniform_teacher(rows, facts)) == is_uniform
    assert bool(warnings.hard_teacher(rows, facts)) == is_hard
