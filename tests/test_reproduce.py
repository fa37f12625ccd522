"""Published tables: what is run, what is not run again, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkd.core.errors import RunError, UsageError
from fedkd.core.run_directory import rows
from fedkd.simulate import reproduce

PAPER = """
title = "A table"
citation = "Somebody, 2026"
accuracy = "best"
tolerance = 150.0
samples = 800
seeds = 2
differs = ["it is not from a paper"]

[options]
dataset = "digits"
proxy = "holdout:size=40"
validation = 500
clients = 2
rounds = 4
model = "cnn:width=4"
local-epochs = 1
distill-epochs = 1
workers = "1"

[[columns]]
name = "IID"
options = { partitioner = "iid" }

[[columns]]
name = "skewed"
options = { partitioner = "dirichlet:alpha=1" }

[[rows]]
name = "FedAvg (theirs)"
options = { algorithm = "fedavg" }
published = [50.0, 40.0]
spread = [0.5, 0.25]

[[rows]]
name = "ensemble"
options = { algorithm = "ensemble" }
published = [30, 20]
"""


@pytest.fixture
def paper(tmp_path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(PAPER)
    return path


def run(*words: object) -> None:
    reproduce.app([str(word) for word in words])


def test_runs_are_made_once_and_interrupted_ones_go_on(paper, tmp_path, capfd):
    """The table has the numbers of rounds.jsonl, and says what is not comparable."""
    words = paper, "--out", tmp_path, "--row", "FedAvg (theirs)", "--column", "skewed", "--markdown", "--scale", "0.5"
    run(*words, "--show")
    assert "| FedAvg (theirs) | skewed | 40.00 ± 0.25 | – | – | – | 0 of 2 | 0 of 2 |" in capfd.readouterr().out
    run(*words)
    printed = capfd.readouterr()
    folder = tmp_path / "mine-0.5"
    files = [folder / f"fedavg-theirs-skewed-seed{seed}" / "rounds.jsonl" for seed in (0, 1)]
    best = [100 * max(row["test_accuracy"] for row in rows(file)) for file in files]
    assert [len(list(rows(file))) for file in files] == [2, 2]
    assert (
        f"| {sum(best) / 2:.2f} ± {abs(best[0] - best[1]) / 2**0.5:.2f} | {sum(best) / 2 - 40:+.2f} | – | 2 of 2 |"
        in (printed.out)
    )
    assert "not comparable" in printed.out
    assert "Differs: it is not from a paper." in printed.out
    before = [file.stat().st_mtime_ns for file in files]
    result = files[1].with_name("result.json")
    result.write_text(json.dumps({**json.loads(result.read_text()), "status": "interrupted"}))
    run(*words)
    assert "seed 0" not in capfd.readouterr().err
    assert files[0].stat().st_mtime_ns == before[0]
    assert json.loads(result.read_text())["status"] == "ok"


def test_only_runs_that_have_ended_are_within_the_tolerance(paper):
    table = reproduce.read(str(paper))
    cell = reproduce.cells_of(table, {}, 1.0)[1]
    assert reproduce.images(table, cell) == 4 * 800
    curves = [[10.0, 30.0, 20.0, 25.0], [10.0, 20.0]]
    for found, within in ((curves, "–"), ([curves[0]], "yes"), ([], "–"), ([[], curves[0]], "yes")):
        grid = reproduce.table(table, [(cell, found)], 1.0)
        assert grid.rows[0][5] == within
    assert reproduce.table(table, [(cell, [curves[0]])], 1.0).rows[0][3:5] == ["30.00", "-10.00"]
    last = table.model_copy(update={"accuracy": "last", "tolerance": 10.0})
    assert reproduce.table(last, [(cell, [curves[0]])], 1.0).rows[0][3:6] == ["25.00", "-15.00", "no"]


def test_a_run_that_fails_ends_the_command(paper, tmp_path):
    paper.write_text(paper.read_text().replace("holdout:size=40", "holdout:size=4000"))
    with pytest.raises(RunError, match=r"seed0 ended with code \d"):
        run(paper, "--out", tmp_path, "--seeds", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("published = [30, 20]", "published = [30]"), "the row ensemble has not one number for each column"),
        (("tolerance = 150.0", "tolerance = 'two'"), "tolerance: Input should be a valid number"),
        (("samples = 800", ""), "samples: Field required"),
        (("samples = 800", "samples = 800\nsample = 1"), "sample: Extra inputs are not permitted"),
        (("clients = 2", "clients = 0"), "clients"),
        (("clients = 2", "client = 2"), "client"),
    ],
)
def test_a_scenario_file_with_a_mistake_is_refused(change, message, paper, tmp_path):
    paper.write_text(paper.read_text().replace(*change))
    with pytest.raises(UsageError, match=message):
        run(paper, "--out", tmp_path)
    assert not list(tmp_path.glob("mine*/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "Unknown table 'nothing'"),
        (["./nothing.toml"], "Cannot read the scenario file"),
        (["PAPER", "--row", "fedavg"], "Unknown row 'fedavg'"),
        (["PAPER", "--column", "iid"], "Known: IID, skewed"),
    ],
)
def test_what_is_not_there_is_named(words, message, paper):
    with pytest.raises(UsageError, match=message):
        run(*(paper if word == "PAPER" else word for word in words))


@pytest.mark.parametrize("name", sorted(path.stem for path in reproduce.PAPERS.glob("*.toml")))
def test_each_table_is_known_to_fedkd_simulate(name, capsys):
    """All of its cells, and it is in the list with its cost."""
    table = reproduce.read(name)
    cells = reproduce.cells_of(table, {}, 1.0)
    assert cells
    assert len({cell.run(Path("x"), 0) for cell in cells}) == len(cells)
    run()
    assert name in capsys.readouterr().out
