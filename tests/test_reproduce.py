"""Published tables: what is run, what is not run again, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedkd.core import cli, quotes, runtime, specs, subruns
from fedkd.core.errors import RunError, UsageError
from fedkd.core.run_directory import rows
from fedkd.distill import runner
from fedkd.distill.task import prepare
from fedkd.reproduce import __main__ as reproduce
from fedkd.reproduce import papers, speed
from fedkd.reproduce.__main__ import Measured
from tests.conftest import TINY, simulated

PAPER = """
title = "A table"
citation = "Somebody, 2026"
measure = "best"
tolerance = 150.0
samples = 800
seeds = 2
differs = ["it is not from a paper"]

[options]
dataset = "digits"
proxy = "holdout:size=40"
validation = 1000
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


class InThisProcess:
    """Stands in for the process of a run: it would import everything again. `test_sweep` has true ones."""

    def __init__(self, words: list[str], **_: object) -> None:
        assert words[:2] == [sys.executable, "-m"]
        self.words = words[2:]

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        module, *arguments = self.words
        with redirect_stdout(sys.stderr), pytest.raises(SystemExit) as end:
            cli.run(import_module(f"{module}.__main__").app, arguments)
        return end.value.code


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(subruns, "subprocess", SimpleNamespace(Popen=InThisProcess))


@pytest.mark.usefixtures("in_this_process")
def test_runs_are_made_once_and_interrupted_ones_go_on(paper, tmp_path, capfd):
    """The table has the numbers of rounds.jsonl, and says what is not comparable."""
    words = (
        paper,
        "--out",
        tmp_path,
        "--row",
        "FedAvg (theirs)",
        "--column",
        "skewed",
        "--format",
        "markdown",
        "--scale",
        "0.5",
    )
    run(*words, "--show")
    assert "| FedAvg (theirs) | skewed | 40.00 ± 0.25 | – | – | – | 0 of 2 | 0 of 2 |" in capfd.readouterr().out
    run(*words)
    printed = capfd.readouterr()
    files = [file / "rounds.jsonl" for file in sorted((tmp_path / "mine-0.5").glob("fedavg-theirs-skewed-*-seed?"))]
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


def measured(*numbers: float | None, has_ended: bool = True) -> list[Measured]:
    return [Measured(number, 4, has_ended) for number in numbers]


@pytest.mark.parametrize(
    ("runs", "within"),
    [
        (measured(30.0), "yes"),
        (measured(30.0, -95.0), "yes"),
        (measured(-95.0), "no"),
        (measured(30.0, has_ended=False), "–"),
        (measured(None), "–"),
        (measured(30.0, None), "–"),
        ([Measured(None, 0, False)], "–"),
        ([Measured(None, 0, False), *measured(30.0)], "yes"),
        ([*measured(30.0), *measured(30.0, has_ended=False)], "–"),
        ([], "–"),
    ],
)
def test_only_runs_that_have_ended_are_within_the_tolerance(runs, within, paper):
    """Of those that have begun; a run without a number (that did not reach the accuracy) leaves the mean undecided."""
    table = papers.read(str(paper)).model_copy(update={"tolerance": 75.0})
    cell = papers.cells_of(table, {}, 1.0)[1]
    assert papers.images(table, cell.config) == 4 * 800
    assert reproduce.table(table, [(cell, runs)], 1.0).rows[0][5] == within
    assert reproduce.table(table, [(cell, runs)], 0.5).rows[0][5] == "–"
    ended = sum(run.has_ended for run in runs)
    assert reproduce.table(table, [(cell, runs)], 1.0).rows[0][6] == f"{ended} of {len(runs)}"


def run_directory_of(tmp_path: Path, accuracies: list[float | None], status: str = "ok", key: str = "") -> Path:
    out = tmp_path / "run"
    out.mkdir(exist_ok=True)
    lines = [{"test_accuracy": accuracy, "client_accuracy": accuracy and accuracy / 2} for accuracy in accuracies]
    (out / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "result.json").write_text(json.dumps({"status": status}))
    return out


@pytest.mark.parametrize(
    ("measure", "accuracies", "expected"),
    [
        ("last", [0.1, 0.3, 0.2], 20.0),
        ("best", [0.1, 0.3, 0.2], 30.0),
        ("best", [None, 0.3, None], 30.0),
        ("last", [None, None], None),
        ("last", [], None),
        ("rounds", [0.1, 0.3, 0.5], 3.0),
        ("rounds", [0.1, 0.3, 0.4], None),
    ],
)
def test_what_was_published_is_what_is_measured(measure, accuracies, expected, paper, tmp_path):
    if measure == "rounds":
        paper.write_text(paper.read_text().replace('"IID"', '"IID"\ntarget=0.5').replace('"skewed"', '"s"\ntarget=0.5'))
    paper.write_text(paper.read_text().replace('measure = "best"', f'measure = "{measure}"'))
    table = papers.read(str(paper))
    cell = papers.cells_of(table, {}, 1.0)[0]
    out = run_directory_of(tmp_path, accuracies)
    assert reproduce.measure(table, cell, out) == Measured(expected, len(accuracies), True)
    if measure != "rounds":
        clients = dataclasses.replace(cell, key="client_accuracy")
        assert reproduce.measure(table, clients, out).number == (expected and expected / 2)
    else:
        assert cell.config.stop_when == "test_accuracy>=0.5"
        out = run_directory_of(tmp_path, accuracies, "interrupted")
        assert reproduce.measure(table, cell, out) == Measured(None, len(accuracies), False)


@pytest.mark.usefixtures("in_this_process")
def test_a_table_of_distillations_has_three_networks_and_its_rows_share_runs(tmp_path, capfd):
    path = tmp_path / "kd.toml"
    path.write_text("""
        title = "Distillation"
        citation = "Somebody, 2026"
        command = "distill"
        measure = "last"
        tolerance = 1.0
        samples = 1400
        seeds = 1
        differs = []
        options = { dataset = "digits", teacher = "cnn:width=4", student = "cnn:width=2", epochs = 20 }
        columns = [{ name = "cnn", options = { teacher-epochs = 10, corrupted-images = 20 } }]
        rows = [
            { name = "teacher", key = "teacher", published = [90.0] },
            { name = "student", key = "baseline", published = [80.0] },
            { name = "KD", published = [85.0] },
            { name = "KD, best", key = "student.largest_test_accuracy", published = [85.0] },
        ]
    """)
    run(path, "--out", tmp_path, "--scale", "0.1", "--format", "markdown")
    (out,) = (tmp_path / "kd-0.1").glob("teacher-cnn-*-seed0")
    (entry,) = json.loads((out / "result.json").read_text())["runs"]
    printed = capfd.readouterr().out
    keys = (
        ("teacher", "accuracy"),
        ("baseline", "accuracy"),
        ("student", "accuracy"),
        ("student", "largest_test_accuracy"),
    )
    for row, (network, key) in zip(("teacher", "student", "KD", "KD, best"), keys, strict=True):
        accuracy = 100 * entry["evaluation"][network][key]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {row} "))
        assert f" {accuracy:.2f} " in line
        assert "| 1 of 1 | 2 of 2 | 5,600 |" in line
    assert sorted(out.parent.iterdir()) == [out, out.with_suffix(".toml")]
    assert papers.cells_of(papers.read(str(path)), {}, 0.1)[0].config.teacher_epochs == 1


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_was_killed_before_its_first_round_begins_anew(paper, tmp_path):
    """It has a config and no checkpoint, so it cannot be resumed."""
    cell = papers.cells_of(papers.read(str(paper)), {}, 0.25)[2]
    out = cell.run(tmp_path / "mine-0.25", 0)
    out.mkdir(parents=True)
    (out / "config.toml").write_text("")
    (out / "partition.npz").write_text("half")
    run(paper, "--out", tmp_path, "--seeds", "1", "--scale", "0.25", "--row", "ensemble", "--column", "IID")
    assert reproduce.has_ended(out)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_fails_ends_the_command(paper, tmp_path):
    paper.write_text(paper.read_text().replace("holdout:size=40", "holdout:size=4000"))
    with pytest.raises(RunError, match=r"FedAvg \(theirs\), IID, seed 0 ended with code 2; it has said why") as caught:
        run(paper, "--out", tmp_path, "--seeds", "1")
    assert caught.value.code == 2


def test_other_options_are_another_run(paper):
    """Whatever the titles of rows and columns are made of."""
    text = paper.read_text().replace('"FedAvg (theirs)"', '"α+"').replace('"ensemble"\noptions', '"β-"\noptions')
    paper.write_text(text.replace("published = [30, 20]", "published = [30, nan]"))
    cells = papers.cells_of(papers.read(str(paper)), {}, 1.0)
    runs = {cell.run(Path("x"), 0) for cell in cells}
    assert len(runs) == len(cells) == 3
    assert {cell.run(Path("x"), 0) for cell in papers.cells_of(papers.read(str(paper)), {"device": "cpu"}, 1.0)} == runs
    paper.write_text(paper.read_text().replace("local-epochs = 1", "local-epochs = 2"))
    assert not runs & {cell.run(Path("x"), 0) for cell in papers.cells_of(papers.read(str(paper)), {}, 1.0)}


def test_an_accuracy_that_was_not_reached_is_said(paper):
    text = paper.read_text().replace('"IID"', '"IID"\ntarget = 0.5').replace('"skewed"', '"s"\ntarget = 0.5')
    paper.write_text(text.replace('measure = "best"', 'measure = "rounds"'))
    table = papers.read(str(paper))
    cell = papers.cells_of(table, {}, 1.0)[0]
    (row,) = reproduce.table(table, [(cell, measured(3.0, None))], 1.0).rows
    assert row[2:7] == ["50 ± 0.5", "not reached (1 of 2)", "-47.00", "–", "2 of 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("published = [30, 20]", "published = [30]"), "the row ensemble has not one number for each column"),
        (("tolerance = 150.0", "tolerance = 'two'"), "tolerance: Input should be a valid number"),
        (("samples = 800", ""), "samples: Field required"),
        (("samples = 800", "samples = 800\nsample = 1"), "sample: Extra inputs are not permitted"),
        (("tolerance = 150.0", "tolerence = 1"), "tolerence: Extra inputs are not permitted"),
        (("tolerance = 150.0", "tolerance = nan"), "tolerance: "),
        (("seeds = 2", "seeds = 0"), "seeds: "),
        (("published = [30, 20]", "published = [30, inf]"), "it is not finite"),
        (('"ensemble"\noptions', '"FedAvg (theirs)"\noptions'), "have the same name"),
        (('workers = "1"', 'compare = "local"'), "compare is no option of a table"),
        (('workers = "1"', "seeds = 3"), "seeds is no option of a table"),
        (('dataset = "digits"', 'dataset = "digitz"'), "FedAvg .theirs., IID: Unknown dataset 'digitz'"),
        (("published = [30, 20]", 'published = [30, 20]\nkey = "clients"'), "Unknown key 'clients'"),
        (
            ("published = [30, 20]", 'published = [30, 20]\nkey = "local_accuracy"'),
            "local_accuracy.* needs --local-test",
        ),
        (('"best"', '"rounds"'), "the column IID has a target if, and only if, measure is rounds"),
        (('"best"', '"best"\ncommand = "distill"'), "measure is last with fedkd.distill"),
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


def test_the_example_in_the_docs_is_a_table(tmp_path):
    page = (papers.FOLDER.parents[1] / "docs" / "reproducing.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    table = papers.read(str(tmp_path / "mine.toml"))
    assert [cell.published for cell in papers.cells_of(table, {}, 1.0)] == table.rows[0].published


@pytest.mark.parametrize("name", papers.names())
def test_each_table_is_known_to_its_command(name):
    """All of its cells, each with a run directory of its own or the options of another one."""
    table = papers.read(name)
    cells = papers.cells_of(table, {}, 1.0)
    assert cells
    runs = {cell.run(Path("x"), 0): cell.config for cell in cells}
    assert len({repr(config) for config in runs.values()}) == len(runs)
    assert len({(cell.row, cell.column) for cell in cells}) == len(cells)
    assert all(cell.published >= 1 for cell in cells)  # percent or rounds, not fractions


def test_the_list_has_each_table_with_its_cost(monkeypatch, capsys):
    monkeypatch.setattr(speed, "images_per_second", lambda *_: 1e4)
    run()
    shown = capsys.readouterr()
    assert all(name in shown.out for name in papers.names())
    assert shown.err == "", "options that a method does not use are named by its run"


def test_the_cost_is_that_of_the_cores_in_use(paper, monkeypatch):
    monkeypatch.setattr(speed, "images_per_second", lambda *_: 100)
    monkeypatch.setattr(runtime, "cores", lambda: 4)
    config = papers.cells_of(papers.read(str(paper)), {"device": "cpu"}, 1.0)[0].config
    assert speed.hours(config, 3600 * 100) == 1 / 2  # two clients
    monkeypatch.undo()
    assert speed.images_per_second("cnn:width=2", "group", 4, 32, "cpu") > 1


def cells(command: str, *keys: str) -> dict[str, papers.Cell]:
    """Cells of the tables that have between them every value of these options."""
    found: dict[str, papers.Cell] = {}
    seen: set[tuple[str, str]] = set()
    for name in papers.names():
        table = papers.read(name)
        for cell in papers.cells_of(table, {}, 1.0) if table.command == command else ():
            values = {key: str(getattr(cell.config, key)) for key in keys}
            if not values.items() <= seen:
                seen |= values.items()
                found[", ".join(values.values())] = cell
    return found


METHODS = cells("simulate", "algorithm", "model", "norm", "optimizer")
LOSSES = cells("distill", "teacher", "student", "loss")


@pytest.mark.parametrize("cell", METHODS.values(), ids=METHODS)
def test_a_round_of_each_method_and_model_of_the_tables(cell, tmp_path):
    """With their own options but for the data, the clients and the lengths."""
    options = {key: value for key, value in cell.config.run_config().items() if key not in (*TINY, "out")}
    options |= {"dataset": "noise:size=100", "proxy": "holdout:size=16", "partitioner": "iid"}
    options |= {"model": cell.config.model, "clients": 4, "rounds": 1, "batch-size": 8, "distill-batch-size": 8}
    options |= {"local-steps": 1, "distill-steps": 1, "validation": 20 if cell.config.validation else 0}
    options |= {"participation": 0.5, "stop-when": ""}
    (row,) = simulated(tmp_path / "run", **options)
    assert row["participants"] == 2
    assert row[cell.key] is not None


@pytest.mark.parametrize("cell", LOSSES.values(), ids=LOSSES)
def test_a_step_of_each_loss_and_pair_of_the_tables(cell):
    config = dataclasses.replace(cell.config, dataset="noise:size=200", device="cpu")
    task, _ = prepare(config)
    runner._check_training_step(task, config, [specs.call("distillation", text) for text in quotes.split(config.loss)])


@pytest.mark.real
def test_a_table_at_a_hundredth_of_its_rounds(tmp_path, capfd):
    """One round on real images."""
    words = "feddistill-table2", "--scale", "0.01", "--seeds", "1", "--column", "alpha = 0.1", "--out", tmp_path
    run(*words, "--row", "FedAvg", "--format", "markdown")
    printed = capfd.readouterr().out
    assert re.search(
        r"\| FedAvg \| alpha = 0.1 \| 35.37 \| \d+.\d\d \| -\d+.\d\d \| – \| 1 of 1 \| 1 of 1 \| 50,000", printed
    )


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.00001, "1 min"), (0.5, "30 min"), (1.25, "1.2 h"), (48, "48.0 h"), (300, "12 days"), (1360, "57 days")],
)
def test_a_time_has_no_exponent_and_is_in_days_above_48_hours(hours, text):
    assert reproduce.duration(hours) == text
