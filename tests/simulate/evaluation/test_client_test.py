"""``--client-test-samples``: which test images the clients' models and their ensemble are evaluated on."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from fedkd.algorithms.base import Update
from fedkd.core import tensors
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Reply
from fedkd.core.config import Config
from fedkd.core.report import table
from fedkd.data.readers import stratified
from fedkd.simulate.evaluation import metrics, per_client
from fedkd.simulate.experiment import prepare
from fedkd.simulate.rounds import Round
from tests.conftest import simulated, tiny

LOGITS = 10 * 4  # bytes for one image


@pytest.mark.parametrize("count", [1, 7, 10, 50, 51, 358, 359, 1000])
def test_each_class_is_in_the_sample_in_proportion(experiment, count):
    labels = experiment.test.labels
    rows = stratified(labels, count)
    assert len(set(rows.tolist())) == len(rows) == min(count, 359)
    assert rows.tolist() == sorted(rows.tolist())
    drawn, all_ = Counter(labels[rows].tolist()), Counter(labels.tolist())
    for name in all_:
        share = len(rows) * all_[name] / 359
        assert math.floor(share) <= drawn[name] <= math.ceil(share)


def test_the_sample_is_drawn_and_not_the_first_of_each_class(experiment):
    labels = experiment.test.labels
    first = torch.cat([(labels == name).nonzero().flatten()[:5] for name in range(10)])
    assert len(set(stratified(labels, 50).tolist()) & set(first.tolist())) < 25


def test_the_sample_is_the_same_for_every_method_and_seed():
    options = {"client_test_samples": 50, "model": "cnn:width=4"}
    samples = []
    for algorithm, seed in (("ensemble", 0), ("ensemble", 1), ("local", 0)):
        experiment = prepare(tiny(algorithm=algorithm, seed=seed, **options))
        samples.append(experiment.client_test.pixels[experiment.test_sample])
        assert len(experiment.client_test) == (359 if algorithm == "local" else 50)
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    assert len(samples[0].flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("algorithm", ["ensemble", "local"])
def test_accuracies_on_the_sample_and_on_all_test_images_by_hand(algorithm):
    """Client 0 is right on the sample only, client 1 everywhere, client 2 nowhere."""
    experiment = prepare(tiny(algorithm=algorithm, client_test_samples=50))
    rows = stratified(experiment.test.labels, 50)
    is_sampled = torch.zeros(359, dtype=torch.bool).index_fill(0, rows, True)
    right = 9.0 * F.one_hot(experiment.test.labels, 10).float()
    wrong = right.roll(1, -1)
    sent = [torch.where(is_sampled[:, None], 2 * right, wrong), right, wrong]
    if algorithm == "ensemble":
        sent = [logits[rows] for logits in sent]

    def exchange(kind, number, requests, expected):
        assert {each.sizes["logits"] for each in expected.values()} == {LOGITS * len(sent[0])}
        return [Reply(c, Update({"logits": t}, 1), "", SerializedBytes()) for c, t in enumerate(sent)]

    updates = {client: Update({}, 5) for client in range(3)}
    none = {"failures": [], "serialized": SerializedBytes(), "downlink": Traffic(), "uplink": Traffic()}
    round_ = Round(1, {}, updates=updates, **none)
    found = metrics.evaluate_clients(experiment, exchange, round_)
    assert found.failures == []
    assert found.client_accuracy == pytest.approx(2 / 3)
    assert found.teacher["teacher_accuracy"] == 1.0
    row = metrics.round_row(experiment, round_, (0.5, 1.0) if algorithm == "ensemble" else None, found)
    assert row["client_accuracy"] == pytest.approx(2 / 3)
    assert row["test_accuracy"] == (0.5 if algorithm == "ensemble" else pytest.approx((1 + 50 / 359) / 3))


def test_students_and_test_accuracies_do_not_depend_on_the_sample(tmp_path):
    options = {"compare": "fd", "rounds": 1, "model": "cnn:width=4"}
    whole = simulated(tmp_path / "whole", client_test_samples=0, **options)
    some = simulated(tmp_path / "some", client_test_samples=50, **options)
    same = [row.keys() - {*metrics.TEACHER, "evaluation_bytes", "clients", *per_client.KEYS} for row in whole]
    for one, other, keys in zip(whole, some, same, strict=True):
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    assert [row["client_accuracy"] for row in whole] != [row["client_accuracy"] for row in some]
    assert whole[1]["test_accuracy"] == whole[1]["client_accuracy"], "fd has no student"
    students = [tensors.load(tmp_path / name / "student.safetensors") for name in ("whole", "some")]
    assert tensors.equal(*students)
    framing = whole[0]["evaluation_bytes"] - 3 * 359 * LOGITS
    assert 0 < framing < 1000
    assert some[0]["evaluation_bytes"] == 3 * 50 * LOGITS + framing
    assert some[1]["evaluation_bytes"] == whole[1]["evaluation_bytes"], "without a student on all test images"
    result = json.loads((tmp_path / "some" / "result.json").read_text())["runs"]
    assert {(run["test_samples"], run["client_test_samples"]) for run in result} == {(359, 50)}
    curves = {(row["algorithm"], 0): [row] for row in some}
    assert "teacher, clients: on 50 of the 359 test images" in table.side_by_side(result, curves).caption


def test_the_evaluation_is_a_small_part_of_the_default_run():
    """In forward passes of one image; a training step counts as three. The server's work is not run in parallel."""
    config = Config.parse({"clients": 20})
    private, proxy, test, workers = 45_000, 5_000, 10_000, 2
    training = (3 * private * config.local_epochs + config.clients * proxy) / workers
    distillation = 3 * proxy * config.distill_epochs
    evaluation = test + config.clients * (config.client_test_samples or test) / workers
    assert evaluation / (training + distillation + evaluation) < 0.15
    fedavg = 3 * private * config.local_epochs / workers
    assert evaluation / (fedavg + evaluation) < 0.15
