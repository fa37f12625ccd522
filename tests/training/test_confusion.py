"""``confusion.csv`` against scikit-learn, and in runs."""

from __future__ import annotations

import csv
import json

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from fedkd.core import tensors
from fedkd.simulate import simulate
from fedkd.simulate.experiment import prepare
from fedkd.training import confusion, loop
from tests.conftest import tiny
from tests.simulate.test_resume import resume


def read(path):
    titles, *rows = csv.reader(path.read_text().splitlines())
    assert [row[0] for row in rows] == titles[1:]
    return titles[1:], np.array([list(map(int, row[1:])) for row in rows])


def test_it_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(6, (2, 100), generator=generator)
    labels[labels == 5] = 4  # a class without images
    ours = confusion.matrix(labels, predicted, 7)
    assert np.array_equal(ours.numpy(), confusion_matrix(labels, predicted, labels=range(7)))


def test_names_are_quoted_and_classes_without_a_name_have_their_number(tmp_path):
    names = ("cat, domestic", 'the "big" one')
    (tmp_path / "a.csv").write_text(confusion.as_csv(torch.arange(9).reshape(3, 3), names))
    titles, counts = read(tmp_path / "a.csv")
    assert titles == [*names, "2"]
    assert counts.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_it_is_that_of_the_last_student_also_after_a_resume_with_nothing_left(tmp_path, monkeypatch):
    out, passes = tmp_path / "run", []
    predict = loop.predict

    def counted(model, pixels, *more):
        passes.append(len(pixels))
        return predict(model, pixels, *more)

    monkeypatch.setattr(loop, "predict", counted)
    simulate(tiny(algorithm="fedavg", compare="local", learning_rate=0.05, out=str(out)))
    assert passes.count(359) == 2 * (1 + 3) + 2 * 3, "in each round: a student and three clients; three clients"
    experiment = prepare(tiny(algorithm="fedavg"))
    logits = experiment.setup.trainer.predict(
        "cnn:width=8", tensors.load(out / "student.safetensors"), experiment.test.pixels
    )
    expected = confusion_matrix(experiment.test.labels, logits.argmax(-1), labels=range(10))
    titles, counts = read(out / "confusion.csv")
    assert titles == [str(digit) for digit in range(10)]
    assert np.array_equal(counts, expected)
    first, local = json.loads((out / "result.json").read_text())["runs"]
    assert np.trace(counts) / 359 == first["test_accuracy"]
    assert local["evaluated_model"] == "clients"
    assert [path.name for path in out.glob("confusion*")] == ["confusion.csv"]
    (out / "confusion.csv").unlink()
    resume(out)
    assert np.array_equal(read(out / "confusion.csv")[1], expected)
    resume(out, rounds=3)
    assert not np.array_equal(read(out / "confusion.csv")[1], expected)
