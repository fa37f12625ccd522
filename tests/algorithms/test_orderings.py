"""Runs with 20 clients: every method learns, and the expected order of methods."""

from __future__ import annotations

import pytest

from fedkd.core.catalog import CATALOG
from tests.conftest import simulated

#: Enough local training for methods whose clients start anew in every round; a test of a minute, not a benchmark.
BUDGET = {
    "clients": 20,
    "rounds": 2,
    "proxy": "holdout:size=160",
    "partitioner": "dirichlet:alpha=0.5",
    "local_epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.04,
    "distill_epochs": 10,
    "evaluate_every": 9,
}
LARGER = {"fedgems": "cnn:width=16", "fed-et": "cnn:width=16"}
PERSONAL = 0.25  # the mean of clients that have a few classes each
STUDENT = 0.5  # where there is a global one; chance is 0.1
#: With a part of their budget, and so with a lower limit.
DATA_FREE = {name: f"{name}:epochs=15,generator_steps=10,generator_width=8" for name in ("dense", "co-boosting")}
OPTIONS = {**DATA_FREE, "fedgkt": "fedgkt:private-features=true"}


def accuracy(out, **changes):
    return simulated(out, **{**BUDGET, **changes})[-1]["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CATALOG["algorithm"]))
def test_every_method_learns_with_twenty_clients(name, tmp_path):
    last = simulated(tmp_path, **BUDGET, algorithm=OPTIONS.get(name, name), student=LARGER.get(name, ""))[-1]
    assert last["test_accuracy"] > (PERSONAL if last["test_loss"] is None or name in DATA_FREE else STUDENT)


@pytest.mark.slow
def test_a_distilled_student_is_between_local_and_central_training(tmp_path):
    found = {
        name: accuracy(tmp_path / name.replace(":", "-"), algorithm=name)
        for name in ("local", "ensemble", "dsfl", "central")
    }
    assert found["local"] + 0.1 < min(found["ensemble"], found["dsfl"])
    assert max(found["ensemble"], found["dsfl"]) < found["central"]


@pytest.mark.slow
def test_a_proxy_of_noise_collapses(tmp_path):
    real, noise = (accuracy(tmp_path / p[:5], proxy=p) for p in ("holdout:size=160", "noise:size=160"))
    assert noise < real - 0.1


@pytest.mark.slow
def test_one_bit_labels_are_within_two_points_of_float32(tmp_path):
    """The mean over three seeds, each paired, once the curves are flat; earlier one bit is slower by some points."""
    longer = {"algorithm": "dsfl", "rounds": 6, "proxy": "holdout:size=287"}
    differences = [
        accuracy(tmp_path / f"bits{seed}", **longer, seed=seed, uplink_codec="bits:bits=1,coder=range")
        - accuracy(tmp_path / f"float{seed}", **longer, seed=seed)
        for seed in range(3)
    ]
    assert sum(differences) / 3 > -0.02, differences
