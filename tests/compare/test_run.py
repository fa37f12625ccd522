"""Runs in Python."""

from __future__ import annotations

import json

import pytest
import torch

import fedkd
from fedkd.core.errors import DataError, UsageError
from tests.conftest import TINY, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {key.replace("-", "_"): value for key, value in TINY.items()}
    out = tmp_path_factory.mktemp("run") / "run"
    return fedkd.run(**options | {"algorithm": "fedavg", "compare": ["local"], "seeds": 2, "out": str(out)})


def lines(run):
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]


def test_its_tables_are_its_files(run):
    rows, results = lines(run), json.loads((run.path / "result.json").read_text())["runs"]
    assert run.rounds.to_dict("list")["test_accuracy"] == [row["test_accuracy"] for row in rows]
    assert list(run.rounds.columns) == list(rows[0])
    assert run.summaries.to_dict("list")["test_accuracy"] == [each["test_accuracy"] for each in results]
    clients = [
        (row["algorithm"], row["round"], each["client"], each["accuracy"]) for row in rows for each in row["clients"]
    ]
    frame = run.clients
    assert list(zip(frame["algorithm"], frame["round"], frame["client"], frame["accuracy"], strict=True)) == clients
    assert run.table().titles[:2] == ["method", "test acc"]
    assert run.table()._repr_markdown_() == str(run.table()) == run.table().markdown()
    assert run.config["algorithm"] == "fedavg"
    assert [type(each) for each in (fedkd.load(run.path), fedkd.load(str(run.path)))] == [fedkd.Run] * 2


def test_its_models_give_the_accuracies_of_the_run(run):
    from fedkd.simulate.experiment import prepare

    test = prepare(tiny()).test
    for seed in (0, 1):
        model = run.global_model("fedavg", seed)
        assert not model.training
        with torch.inference_mode():
            right = model(test.pixels).argmax(1) == test.labels
        (expected,) = run.summaries.query(f"algorithm == 'fedavg' and seed == {seed}")["test_accuracy"]
        assert right.float().mean().item() == pytest.approx(expected, abs=1e-6)
    first, named = run.global_model(), run.global_model("fedavg", 0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), named.parameters(), strict=True))


def test_a_user_defined_model_is_named_before_its_code_runs(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef Net(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))\n"
    )
    net = f"{tmp_path / 'net.py'}:Net"
    options = {key.replace("-", "_"): value for key, value in TINY.items()}
    fedkd.run(**options | {"algorithm": "fedavg", "rounds": 1, "model": net, "out": str(tmp_path / "run")})
    run = fedkd.load(tmp_path / "run")
    with pytest.raises(DataError, match=r"has a user-defined model; give it by --model .* \(in Python: model=\)"):
        run.global_model()
    assert run.global_model(model=net)(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 10)


def test_mistakes_are_one_sentence(run, tmp_path):
    for call, expected in (
        (lambda: run.global_model("local"), "Unknown method with a global student 'local'"),
        (lambda: run.global_model(seed=7), "has no global student with seed 7"),
        (lambda: fedkd.load(tmp_path), "is not the directory of a run"),
        (lambda: fedkd.run(roundz=2), "'roundz'. Did you mean 'rounds'"),
    ):
        with pytest.raises(UsageError, match=expected):
            call()
    assert len(repr(run)) < 400
    assert repr(run).startswith(f"Run({str(run.path)!r}: fedavg ")
    assert "is not the directory of a run" in repr(fedkd.Run(tmp_path))


def test_a_run_round_by_round_left_and_continued(tmp_path):
    """The rows are those of the run in one piece, each when its round is complete; nothing is computed between them."""
    options = {key.replace("-", "_"): value for key, value in TINY.items()} | {"algorithm": "fedavg", "seeds": 2}
    left, whole = str(tmp_path / "left"), str(tmp_path / "whole")
    rows = fedkd.rounds(**options | {"rounds": 2, "out": left})
    first = [next(rows), next(rows), next(rows)]
    assert [(row["seed"], row["round"]) for row in first] == [(0, 1), (0, 2), (1, 1)]
    assert list(fedkd.load(left).rounds["round"]) == [1, 2, 1]
    assert not (tmp_path / "left" / "result.json").exists()
    with pytest.raises(UsageError, match="in use by a run of this process"):
        fedkd.run(resume=left)
    rows.close()
    assert json.loads((tmp_path / "left" / "result.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "left" / "lock").exists()
    rest = list(fedkd.rounds(resume=left))
    fedkd.run(**options | {"rounds": 2, "out": whole})

    def numbers(row):
        return {key: value for key, value in row.items() if not key.endswith("_seconds")}

    assert [numbers(row) for row in (*first, *rest)] == [numbers(row) for row in lines(fedkd.load(whole))]
    assert json.loads((tmp_path / "left" / "result.json").read_text())["status"] == "ok"


def test_a_run_that_is_resumed_has_its_own_options(tmp_path):
    options = {key.replace("-", "_"): value for key, value in TINY.items()} | {"algorithm": "fedavg", "rounds": 1}
    run = fedkd.run(**options | {"out": str(tmp_path / "run")})
    before = run.config
    assert list(fedkd.run(resume=run.path, rounds=2).rounds["round"]) == [1, 2]
    assert fedkd.load(run.path).config == {**before, "rounds": 2}
    with pytest.raises(fedkd.FedkdError, match=r"--clients 7 differs from the run in"):
        fedkd.run(resume=run.path, clients=7)


def test_its_figure_has_the_numbers_of_its_rounds(run, images_of_figures, tmp_path):
    figure = run.plot("client_accuracy", panels=["rounds"], columns=1)
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    means = 100 * run.rounds.groupby(["algorithm", "round"])["client_accuracy"].mean()
    assert drawn == {name: pytest.approx(list(means[name])) for name in ("fedavg", "local")}
    figure.savefig(tmp_path / "curve.svg")
    assert "client accuracy (%)</text>" in (tmp_path / "curve.svg").read_text(), "text is text"
    assert figure._repr_png_()[1:4] == b"PNG"
    for call, expected in (
        (lambda: run.plot("accuracy"), "Unknown metric of rounds 'accuracy'"),
        (lambda: run.plot(panels=["round"]), "Unknown panel 'round'"),
        (lambda: run.plot(style="no such style"), "is neither a file of rcParams nor a style"),
    ):
        with pytest.raises(UsageError, match=expected):
            call()


def test_rounds_on_ray_cannot_be_followed():
    with pytest.raises(UsageError, match=r"use fedkd\.run"):
        next(fedkd.rounds(engine="ray"))
