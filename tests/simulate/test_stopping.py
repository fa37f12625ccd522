"""Validation samples, the best student, and runs that end early."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from fedkd.core import tensors
from fedkd.core.config import Config
from fedkd.core.errors import ResumeError, UsageError
from fedkd.core.report.screen import Screen
from fedkd.export import card
from fedkd.simulate import simulate
from fedkd.simulate.checks import check
from fedkd.simulate.evaluation import stopping
from fedkd.simulate.experiment import prepare
from fedkd.training import loop
from fedkd.training.models import checkpoint as students
from tests.conftest import ROOT, simulated, tiny
from tests.simulate.test_resume import SMALL, result_of, resume, stop_after

# With this seed the best rounds of both methods are not the last ones, and some accuracies are equal.
EARLY = {"algorithm": "fedavg", "compare": "scarlet", **SMALL, "validation": 60, "batch_size": 32}
EARLY |= {"patience": 3, "rounds": 8, "seed": 1}


def read(out, name="result.json"):
    return json.loads((out / name).read_text())


def curve(*accuracies):
    """Rows with these validation accuracies."""
    return [{"round": number, "validation_accuracy": value} for number, value in enumerate(accuracies, 1)]


def ended_after(config: Config, rows):
    """The round after which a run ends, and why."""
    return next((n, why) for n in range(len(rows) + 1) if (why := stopping.ended(config, rows[:n])))


# Conditions.


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    out = tmp_path_factory.mktemp("row") / "run"
    simulate(tiny(**SMALL, validation=60, local_test=0.2, rounds=1, round_timeout=9, out=str(out)))
    return read(out, "rounds.jsonl")


def test_every_key_of_a_row_is_a_condition_or_is_refused(row):
    numbers = {key for key, value in row.items() if isinstance(value, int | float)}
    assert numbers - {"training_seconds", "evaluation_seconds", "evaluation_bytes"} == stopping.KEYS
    for key in row:
        if key in stopping.KEYS:
            (condition,) = stopping.conditions(f"{key}>={row[key]}")
            assert condition.is_met(row)
        else:
            with pytest.raises(UsageError, match=f"Unknown key of --stop-when '{key}'.* Known: attempts, "):
                stopping.conditions(f"{key}>=1")


@pytest.mark.parametrize(
    ("comparison", "met"), [(">=", [False, True, True]), (">", [False, False, True]), ("<=", [True, True, False])]
)
def test_comparisons(comparison, met):
    (condition,) = stopping.conditions(f"test_loss{comparison}0.5")
    assert [condition.is_met({"test_loss": value}) for value in (0.4, 0.5, 0.6)] == met
    (opposite,) = stopping.conditions("test-loss < 5e-1")
    assert opposite.text == "test-loss<5e-1"
    assert [opposite.is_met({"test_loss": value}) for value in (0.4, 0.5, 0.6)] == [True, False, False]
    assert not condition.is_met({"test_loss": None})


@pytest.mark.parametrize(
    "text", ["test_accuracy", "test_accuracy=0.6", "test_accuracy==0.6", "test_accuracy=>0.6", "test_accuracy>=60%",
             "test_accuracy>=", ">=0.6", "test_accuracy>=nan", "test_accuracy<inf", "round>=1 and", "0.2<round<3"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match=r"^--stop-when '.*' cannot be read; write KEY>=NUMBER"):
        stopping.conditions(text)


def test_any_of_several_conditions_ends_a_run():
    config = tiny(stop_when=["round>=4", "test_accuracy>=0.6"], rounds=9)
    rows = [{"round": n, "test_accuracy": value} for n, value in enumerate([None, 0.5, 0.7, 0.1, 0.1], 1)]
    assert ended_after(config, rows) == (3, "test_accuracy>=0.6")
    assert ended_after(config, rows[:2] + rows[3:]) == (3, "round>=4")
    assert ended_after(tiny(stop_when="round>=2", rounds=2), rows) == (2, "round>=2")
    assert ended_after(tiny(rounds=2), rows) == (2, "rounds")
    assert stopping.ended(config, []) == ""


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [
        ([0.5, 0.6, 0.6, 0.55, 0.9], 2, (4, "patience")),  # an equal accuracy is no improvement
        ([0.5, 0.6, 0.55, 0.61, 0.6, 0.7], 2, (6, "rounds")),
        ([0.5, 0.4, 0.9], 1, (2, "patience")),
        ([0.1, 0.2, 0.3], 1, (3, "rounds")),
        ([0.9, 0.1, 0.1, 0.1], 3, (4, "patience")),
        ([0.9, 0.1, 0.1], 3, (3, "rounds")),
        ([0.9, 0.1, 0.1], 0, (3, "rounds")),
        ([None, None, None], 1, (3, "rounds")),  # no global student
    ],
)
def test_patience_counts_rounds_since_the_first_best_one(accuracies, patience, expected):
    rows = curve(*accuracies)
    assert ended_after(tiny(validation=9, patience=patience, rounds=len(rows)), rows) == expected
    best = stopping.best(rows)
    known = [value for value in accuracies if value is not None]
    assert best is (rows[accuracies.index(max(known))] if known else None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patience": 2}, "--patience 2 needs --validation"),
        ({"distill_patience": 2}, "--distill-patience 2 needs --validation"),
        ({"stop_when": "validation_loss<1"}, "--stop-when validation_loss<1 needs --validation"),
        ({"stop_when": "test_acuracy>=0.6"}, "Did you mean 'test_accuracy'"),
        ({"validation": 10, "partitioner": "own"}, "--validation holds samples out of the training set"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, expected):
    with pytest.raises(UsageError, match=expected):
        check(tiny(**options))


def test_a_condition_that_cannot_be_used_is_refused_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom fedkd.core import cli\nfrom fedkd.simulate.__main__ import app\n"
        "try: cli.run(app, ['--stop-when', 'round>=2', 'test_acuracy>=0.6'])\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "2 False\n", done.stderr


# The validation samples.


@pytest.mark.parametrize("proxy", ["holdout:size=40", "noise:size=40"])
def test_validation_samples_are_disjoint_from_all_others(tmp_path, proxy):
    simulated(tmp_path / "run", validation=100, proxy=proxy, seeds=2, rounds=1, compare="central")
    train = len(prepare(tiny()).train)
    with np.load(tmp_path / "run" / "partition.npz") as arrays:
        for seed in (0, 1):
            held_out = arrays[f"seed{seed}_validation"]
            assert held_out.tolist() == sorted(held_out)
            proxies = arrays[f"seed{seed}_proxy"] if "holdout" in proxy else []
            assert len(held_out) == 100
            # Every sample of the training set is in one of the three, once.
            assert sorted([*held_out, *proxies, *arrays[f"seed{seed}_rows"]]) == list(range(train))
        assert set(arrays["seed0_validation"]) != set(arrays["seed1_validation"])


def test_no_client_trains_on_validation_samples_and_they_are_not_the_test_set():
    for algorithm in ("ensemble", "central"):
        experiment = prepare(tiny(algorithm=algorithm, validation=100))
        held_out = experiment.samples(experiment.validation_rows)
        known = {image.tobytes() for image in held_out.pixels.numpy()}
        for client in range(experiment.clients):
            assert not known & {image.tobytes() for image in experiment.client(client, 1, {}).data.pixels.numpy()}
        assert not known & {image.tobytes() for image in experiment.test.pixels.numpy()}
        assert not known & {image.tobytes() for image in experiment.setup.proxy.images.numpy()}


def test_more_validation_samples_contain_fewer_ones_and_leave_the_proxy_as_it_is():
    few, many, none = (prepare(tiny(validation=count)) for count in (10, 100, 0))
    assert set(few.validation_rows) < set(many.validation_rows)
    assert few.proxy_rows.tolist() == many.proxy_rows.tolist() == none.proxy_rows.tolist()
    assert len(none.validation_rows) == 0


@pytest.mark.parametrize("count", [1396, 10**6])
def test_too_many_validation_samples_are_refused(count):
    assert prepare(tiny(validation=1395)).partition.sizes.tolist() == [1, 1, 1]
    with pytest.raises(
        UsageError, match=f"--validation {count} and 3 clients need more than the 1,398 private samples"
    ):
        prepare(tiny(validation=count))


# The best student.


def test_the_best_student_is_the_one_of_the_best_round(tmp_path):
    options = {**EARLY, "compare": "local scarlet", "seeds": 2, "patience": 0, "rounds": 4}
    rows = simulated(tmp_path / "run", **options)
    runs = read(tmp_path / "run")["runs"]
    names = {path.name for path in (tmp_path / "run").glob("student*")}
    others = {f"{one}-seed{seed}" for one, seed in (("fedavg", 2), ("scarlet", 1), ("scarlet", 2))}
    assert names == {f"{kind}.safetensors" for kind in ("student", "student-best")} | {
        f"{kind}-{other}.safetensors" for kind in ("student", "student-best") for other in others
    }
    assert any(run["best_round"] not in (None, 4) for run in runs), "the premise"
    for run in runs:
        mine = [row for row in rows if (row["algorithm"], row["seed"]) == (run["algorithm"], run["seed"])]
        if run["algorithm"] == "local":
            assert {row["validation_accuracy"] for row in mine} == {None}
            assert run["best_round"] is run["best_validation_accuracy"] is run["best_test_accuracy"] is None
            continue
        experiment = prepare(tiny(**options).run(run["algorithm"], run["seed"], options["dataset"]))
        suffix = "" if run is runs[0] else f"-{run['algorithm']}-seed{run['seed']}"
        held_out = experiment.samples(experiment.validation_rows)
        for kind, number in (("student", 4), ("student-best", run["best_round"])):
            student = students.load(tmp_path / "run" / f"{kind}{suffix}.safetensors")
            for images, name in ((held_out, "validation"), (experiment.test, "test")):
                logits = experiment.setup.trainer.predict(student.model, student.weights, images.pixels)
                accuracy, loss = loop.score(logits, images.labels)
                assert mine[number - 1][f"{name}_accuracy"] == pytest.approx(accuracy)
                assert mine[number - 1][f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
        best = mine[run["best_round"] - 1]
        assert run["best_validation_accuracy"] == best["validation_accuracy"]
        assert run["best_test_accuracy"] == best["test_accuracy"]
        assert best["validation_accuracy"] == max(row["validation_accuracy"] for row in mine)


def test_without_validation_there_is_no_best_student(tmp_path):
    rows = simulated(tmp_path / "run", **SMALL)
    assert {row["validation_accuracy"] for row in rows} == {row["validation_loss"] for row in rows} == {None}
    assert not (tmp_path / "run" / "student-best.safetensors").exists()
    (run,) = read(tmp_path / "run")["runs"]
    assert (run["ended"], run["rounds"], run["best_round"]) == ("rounds", 2, None)


# Runs that end early.


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    return simulate(tiny(**EARLY, out=str(tmp_path_factory.mktemp("early") / "run")))


def test_a_run_ends_when_its_validation_accuracy_has_not_improved(early):
    for run in read(early)["runs"]:
        assert run["ended"] == "patience"
        assert run["rounds"] == run["best_round"] + 3 < 8


@pytest.mark.parametrize(("every", "rounds"), [(1, 2), (1, 3), (1, 5), (2, 3), (2, 5), (4, 5), (4, 8), (2, 10)])
def test_an_interrupted_run_has_the_bits_of_one_that_was_not(tmp_path, early, every, rounds):
    """Among them the best student, of a round before or after the last checkpoint."""
    whole = result_of(early)
    assert len(whole["students"]) == 4
    stop_after(tiny(**EARLY, checkpoint_every=every, out=str(tmp_path / "parts")), rounds)
    assert result_of(resume(tmp_path / "parts")) == whole


def test_a_best_student_after_the_checkpoint_does_not_count(tmp_path):
    """Round 3 is the best, but the run is resumed to end after round 2."""
    options = {**EARLY, "compare": "", "patience": 0, "checkpoint_every": 2}
    simulate(tiny(**{**options, "rounds": 2}, out=str(tmp_path / "whole")))
    stop_after(tiny(**options, out=str(tmp_path / "parts")), 3)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "rounds.jsonl").read_text().splitlines()]
    assert stopping.best(rows)["round"] == 3, "the premise"
    resume(tmp_path / "parts", rounds=2)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_an_ended_run_is_extended_by_more_patience_and_else_stays_as_it_is(tmp_path):
    out = simulate(tiny(**EARLY, out=str(tmp_path / "parts")))
    before, lines = result_of(out), (out / "rounds.jsonl").read_text()
    for changes in ({}, {"rounds": 9}):
        resume(out, **changes)
        assert result_of(out) == before
        assert (out / "rounds.jsonl").read_text() == lines, "with the times of the first run"
    with pytest.raises(ResumeError, match=r"--validation 50 differs from the run in .*, which has 60"):
        resume(out, validation=50)
    with pytest.raises(UsageError, match="--stop-when 'round' cannot be read"):
        resume(out, stop_when="round")
    assert result_of(out) == before
    resume(out, patience=0, rounds=8, stop_when="round>=7")
    resume(out, stop_when="")
    simulate(tiny(**{**EARLY, "patience": 0}, out=str(tmp_path / "whole")))
    assert result_of(out) == result_of(tmp_path / "whole")


def test_the_last_round_of_a_run_that_ends_early_is_a_last_round(tmp_path, capsys):
    """It has an evaluation of clients, a checkpoint, tables and curves, with seeds of different lengths."""
    options = {**EARLY, "compare": "local", "validation": 0, "patience": 0, "seeds": 2, "rounds": 5}
    options |= {"stop_when": "round>=3 seed>=2", "evaluate_every": 4, "checkpoint_every": 4}
    rows = simulated(tmp_path / "run", **options)
    numbers = {("fedavg", 1): 3, ("local", 1): 3, ("fedavg", 2): 1, ("local", 2): 1}
    for (name, seed), last in numbers.items():
        mine = [row for row in rows if (row["algorithm"], row["seed"]) == (name, seed)]
        assert [row["client_accuracy"] is not None for row in mine] == [False] * (last - 1) + [True]
        (saved,) = (tmp_path / "run" / "checkpoint").glob(f"{name}-seed{seed}-*/checkpoint.json")
        assert json.loads(saved.read_text())["number"] == last
    runs = read(tmp_path / "run")["runs"]
    assert {(run["algorithm"], run["seed"]): run["rounds"] for run in runs} == numbers
    assert [run["ended"] for run in runs] == ["round>=3", "round>=3", "seed>=2", "seed>=2"]
    assert (tmp_path / "run" / "curve.png").exists()
    shown = capsys.readouterr().out
    assert shown.count("ended after round 3 of 5: round>=3") == shown.count("ended after round 1 of 5: seed>=2") == 2


def test_the_progress_counts_the_rounds_that_are_left(tmp_path, monkeypatch):
    expected, progress = [], Screen.progress
    monkeypatch.setattr(Screen, "progress", lambda self, rounds: expected.append(rounds) or progress(self, rounds))
    out = simulate(tiny(**SMALL, compare="local", stop_when="round>=2", rounds=9, out=str(tmp_path / "run")))
    resume(out)
    resume(out, stop_when="round>=3")
    assert expected == [18, 0, 14]


def test_a_best_student_can_be_used_as_any_student(early):
    student = students.load(early / "student-best.safetensors")
    assert student.held_out == 0, "its samples are not those that fedkd.distill holds out"
    assert tensors.digest(student.weights) != tensors.digest(students.load(early).weights)


def test_the_model_card_of_a_best_student_names_its_round(early):
    for run, suffix in zip(read(early)["runs"], ("", "-scarlet-seed1"), strict=True):
        for kind, when, key in (
            ("student", "the last round", "test_accuracy"),
            ("student-best", f"round {run['best_round']}, the best by validation accuracy", "best_test_accuracy"),
        ):
            *_, last = card.trained(early / f"{kind}{suffix}.safetensors")
            assert last.startswith(f"- Accuracy after {when}, ")
            assert last.endswith(f": {100 * run[key]:.2f}%.")
