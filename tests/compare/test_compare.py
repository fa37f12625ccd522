"""Separate runs in one table."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from fedkd.compare.__main__ import compare
from fedkd.compare.reading import by_setting, distilled, read_run
from fedkd.compare.reading import simulated as merged
from fedkd.core.errors import DataError, UsageError
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig
from tests.conftest import ROOT, simulated


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    simulated(root / "both", algorithm="ensemble", compare="fedavg", seeds=2)
    simulated(root / "first", algorithm="ensemble", seeds=2)
    simulated(root / "second", algorithm="fedavg", seeds=2)
    simulated(root / "elsewhere", algorithm="local", partitioner="linear")
    simulated(root / "early", algorithm="local", stop_when="round>=1")
    shutil.copytree(root / "second", root / "other")
    result = json.loads((root / "other" / "result.json").read_text())
    for one in result["runs"]:
        one["partition_sha256"] = "of other images"
    (root / "other" / "result.json").write_text(json.dumps(result))
    shutil.copytree(root / "first", root / "stopped")
    (root / "stopped" / "result.json").write_text(json.dumps({"runs": [], "dataset": "digits"}))
    for name in ("without rounds", "torn"):
        shutil.copytree(root / "first", root / name)
    (root / "without rounds" / "rounds.jsonl").unlink()
    shutil.copytree(root / "stopped", root / "not begun")
    (root / "not begun" / "rounds.jsonl").write_text("")
    shutil.copytree(root / "first", root / "killed")
    (root / "killed" / "result.json").unlink()
    with (root / "torn" / "rounds.jsonl").open("a") as file:
        file.write('{"algorithm": "ens')
    return root


@pytest.fixture(scope="module")
def distillations(tmp_path_factory):
    root = tmp_path_factory.mktemp("distillations")
    common = {
        "dataset": "digits",
        "student": "cnn:width=4",
        "teacher": "cnn:width=8",
        "epochs": 1,
        "corrupted-images": 0,
    }
    for name, changes in {
        "logits": {"seeds": 2},
        "itself": {"seeds": 2, "loss": "self:generations=2", "teacher": ""},
        "longer": {"epochs": 2},
    }.items():
        distill(DistillConfig.parse({**common, "out": str(root / name), **changes}))
    for name, change in (("other", "accuracy"), ("stopped", "status")):
        shutil.copytree(root / "logits", root / name)
        result = json.loads((root / name / "result.json").read_text())
        if change == "status":
            result["status"] = "interrupted"
        else:
            result["runs"][1]["evaluation"]["baseline"]["accuracy"] += 0.01
        (root / name / "result.json").write_text(json.dumps(result))
    return root


def read(paths):
    return merged([read_run(path) for path in paths])


def steady(row):
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_separate_runs_are_equal_to_one_run(runs):
    together, apart = read((runs / "both",)), read((runs / "first", runs / "second"))

    def ordered(finished):
        return sorted(map(steady, finished), key=lambda run: (run["algorithm"], run["seed"]))

    assert ordered(together[0]) == ordered(apart[0])
    assert together[1].keys() == apart[1].keys()
    for key, rows in together[1].items():
        assert list(map(steady, rows)) == list(map(steady, apart[1][key]))


def test_the_command_writes_markdown_and_a_figure(runs, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fedkd.compare",
        runs / "first",
        runs / "second",
        "--format",
        "markdown",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| method | test acc | Δ fedavg |")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def cells(printed, title):
    """The rows of the table with this title, in Markdown."""
    lines = printed[printed.index(title) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_largest_accuracy_is_shown_on_request(runs, distillations, capsys):
    """Of all rounds, or of all epochs."""
    compare(runs / "both", form="markdown")
    compare(distillations / "longer", form="markdown")
    assert "largest" not in capsys.readouterr().out
    compare(runs / "both", form="markdown", largest=True)
    finished, curves = read((runs / "both",))
    found = cells(capsys.readouterr().out, "| method | last round | largest on test |")
    assert [row[0] for row in found] == ["ensemble", "fedavg"]
    for method, last, largest in found:
        tested = [[row["test_accuracy"] for row in rows] for (name, _), rows in curves.items() if name == method]
        most = [max(each) for each in tested]
        assert [run["largest_test_accuracy"] for run in finished if run["algorithm"] == method] == most
        for cell, values in ((last, [each[-1] for each in tested]), (largest, most)):
            assert cell == f"{100 * fmean(values):.1f}% ±{100 * stdev(values):.1f}"
    compare(distillations / "longer", form="markdown", largest=True)
    found = cells(capsys.readouterr().out, "| loss | teacher | last epoch | largest on test |")
    epochs = [json.loads(line) for line in (distillations / "longer" / "epochs.jsonl").open()]
    for row, name in zip(found, ("baseline", "student"), strict=True):
        values = [epoch["test_accuracy"] for epoch in epochs if epoch["network"] == f"{name} seed0"]
        assert row[2:] == ([f"{100 * value:.1f}%" for value in (values[-1], max(values))] if values else [row[2], "–"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("first", "both"), "is in two of the runs"),
        (("first", "elsewhere"), "differ in partitioner"),
        (("first", "early"), "differ in stop-when"),
        (("first", "other"), "has another partition than .* with seed 0"),
        (("first", "nowhere"), "is not the directory of a run"),
        (("without rounds",), "rounds.jsonl is missing or damaged: there is no round of ensemble, seed 0, which"),
        (("not begun",), "has no round; it was interrupted or failed"),
    ],
)
def test_runs_that_do_not_go_together(runs, names, expected):
    with pytest.raises(UsageError if "damaged" not in expected else DataError, match=expected):
        read(tuple(runs / name for name in names))


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_a_run_that_has_not_ended_is_marked(runs, name, capsys):
    """With or without a result.json; a table of several settings has the mark, too."""
    found, _ = read((runs / name, runs / "second"))
    whole = {(run["algorithm"], run["seed"]): run for run in read((runs / "both",))[0]}
    assert all(run["unfinished"] for run in found if run["algorithm"] == "ensemble")
    for run in found:
        expected = whole[run["algorithm"], run["seed"]]
        assert {key: expected[key] for key in steady(run) if key != "unfinished"} == {
            key: value for key, value in steady(run).items() if key != "unfinished"
        }
    compare(runs / name, runs / "second", form="markdown")
    printed = capsys.readouterr().out
    assert [row[0] for row in cells(printed, "| method | test acc")] == ["ensemble†", "fedavg"]
    assert "†: not finished" in printed


def test_settings_side_by_side(runs, capsys):
    compare(runs / "first", runs / "elsewhere", by=("partitioner",), form="markdown")
    titles, _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    settings = [json.loads((runs / name / "result.json").read_text())["runs"] for name in ("first", "elsewhere")]
    assert titles.startswith("| method | iid | linear |")
    accuracies = [f"{100 * fmean(run['test_accuracy'] for run in each):.1f}%" for each in settings]
    assert accuracies[0] in rows[0]
    assert rows[1] == f"| local* | – | {accuracies[1]} |"
    with pytest.raises(UsageError, match=r"Unknown option of --by 'partitoner'. Did you mean 'partitioner'"):
        compare(runs / "first", runs / "elsewhere", by=("partitoner",))
    with pytest.raises(UsageError, match="Unknown --metric 'test_acc'"):
        compare(runs / "first", runs / "elsewhere", by=("partitioner",), metric="test_acc")


def test_a_metric_that_not_every_run_or_round_has(runs, tmp_path, capsys):
    """The total of a run that has not ended; the loss without a student; a number of a run in a figure of rounds."""
    setting = {"by": ("partitioner",), "form": "markdown"}
    compare(runs / "elsewhere", runs / "killed", metric="test_samples", **setting)
    assert "| ensemble | – | –† |" in capsys.readouterr().out
    compare(runs / "elsewhere", runs / "first", metric="test_loss", out=tmp_path, **setting)
    loss = fmean(run["test_loss"] for run in json.loads((runs / "first" / "result.json").read_text())["runs"])
    assert f"| ensemble | – | {loss:.4g} ±" in capsys.readouterr().out
    assert (tmp_path / "curve-2.png").exists()
    compare(runs / "elsewhere", runs / "first", metric="test_accuracy_last5", out=tmp_path / "none", **setting)
    assert "no figure is drawn: rounds have no test_accuracy_last5" in capsys.readouterr().err


def test_an_unknown_metric_of_one_setting(runs):
    with pytest.raises(UsageError, match="Unknown --metric 'test_acuracy'"):
        compare(runs / "first", metric="test_acuracy")


def test_a_damaged_partition_leaves_out_the_page_only(runs, tmp_path, capsys):
    shutil.copytree(runs / "first", tmp_path / "run")
    (tmp_path / "run" / "partition.npz").write_text("junk")
    compare(tmp_path / "run", out=tmp_path / "out")
    assert "report.html is not written" in capsys.readouterr().err
    assert (tmp_path / "out" / "curve.svg").exists()


def test_codecs_make_columns(runs):
    """They may differ in a column; but of one method, they are settings."""
    plain = read_run(runs / "first")
    coded = replace(plain, config={**plain.config, "uplink-codec": "uint8"})
    assert by_setting([plain, coded], ("uplink-codec",)) == {("float32",): [plain], ("uint8",): [coded]}


def test_records_are_those_of_the_results(runs, capsys):
    """A record for each method and seed, with all numbers as they are."""
    compare(runs / "both", form="json", name=("fedavg=FedAvg (ours)",), by=("partitioner",))
    records = json.loads(capsys.readouterr().out)
    results = json.loads((runs / "both" / "result.json").read_text())["runs"]
    names = {"ensemble": "ensemble", "fedavg": "FedAvg (ours)"}
    added = [{"partitioner": "iid", "name": names[run["algorithm"]]} for run in results]
    assert records == [{**more, **run} for more, run in zip(added, results, strict=True)]
    compare(runs / "both", form="csv")
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(line["test_accuracy"]) for line in lines] == [run["test_accuracy"] for run in results]
    assert [line["algorithm"] for line in lines] == [run["algorithm"] for run in results]


def test_a_name_for_a_method_is_that_of_tables(runs, capsys):
    compare(runs / "both", form="latex", name=("fedavg=FedAvg (ours)",))
    printed = capsys.readouterr().out
    assert "FedAvg (ours) & " in printed
    assert r"$\Delta$ FedAvg (ours)" in printed
    with pytest.raises(UsageError, match="--name fedavg cannot be read; write METHOD=NAME"):
        compare(runs / "both", name=("fedavg",))
    with pytest.raises(UsageError, match=r"Unknown method or value in --name 'fedavgg'. Did you mean 'fedavg'"):
        compare(runs / "both", name=("fedavgg=FedAvg (ours)",))


@pytest.mark.usefixtures("images_of_figures")
def test_a_name_for_a_value_is_that_of_its_setting(runs, tmp_path, capsys):
    """In tables and figures, not in records; a Greek letter is a command in LaTeX. Two names must differ."""
    both, by = (runs / "first", runs / "elsewhere"), ("partitioner",)
    compare(*both, by=by, form="latex", name=("iid=α = ∞", "linear=β = 1"), out=tmp_path)
    printed = capsys.readouterr().out
    assert r"method & $\alpha$ = ∞ & $\beta$ = 1 \\" in printed
    assert r"\label{tab:test-accuracy}" in printed
    assert re.search(">digits, [0-9]+ clients, cnn:[^,]*, β = 1<", (tmp_path / "curve-2.svg").read_text())
    compare(*both, by=by, form="json", name=("iid=A",))
    assert {record["partitioner"] for record in json.loads(capsys.readouterr().out)} == {"iid", "linear"}
    with pytest.raises(UsageError, match="Two settings have the name 'A'"):
        compare(*both, by=by, name=("iid=A", "linear=A"))


def test_a_torn_last_line_is_left_out(runs):
    assert read((runs / "torn",)) == read((runs / "first",))


def test_lost_lines_of_a_run_that_has_ended_are_noticed(runs, tmp_path, capsys):
    shutil.copytree(runs / "first", tmp_path / "run")
    path = tmp_path / "run" / "rounds.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    compare(tmp_path / "run")
    assert "rounds.jsonl has 1 of 2 rounds of" in capsys.readouterr().err
    compare(runs / "first")
    assert "has lost lines" not in capsys.readouterr().err


def test_distillations_side_by_side(distillations):
    command = [
        sys.executable,
        "-m",
        "fedkd.compare",
        distillations / "logits",
        distillations / "itself",
        "--format",
        "markdown",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[:5]]
    assert rows[0][:4] == ["loss", "teacher", "test acc", "Δ baseline"]
    for (loss, teacher, accuracy, gain), name in zip([row[:4] for row in rows[3:]], ("logits", "itself"), strict=True):
        runs = json.loads((distillations / name / "result.json").read_text())["runs"]
        own, baseline = ([100 * run["evaluation"][who]["accuracy"] for run in runs] for who in ("student", "baseline"))
        gains = [mine - bare for mine, bare in zip(own, baseline, strict=True)]
        assert loss.split(":")[0] == ("logits" if name == "logits" else "self")
        assert teacher == ("cnn:width=8" if name == "logits" else "itself")
        assert accuracy == f"{fmean(own):.1f}% ±{stdev(own):.1f}"
        assert gain == f"{fmean(gains):+.1f} ±{stdev(gains):.1f}"
    assert rows[2][:3] == ["baseline", "–", f"{fmean(baseline):.1f}% ±{stdev(baseline):.1f}"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("logits", "longer"), "differ in epochs"),
        (("logits", "other"), "has other baseline students than"),
        (("logits", "stopped"), "has not finished"),
    ],
)
def test_distillations_that_do_not_go_together(distillations, names, expected):
    with pytest.raises(UsageError, match=expected):
        distilled([read_run(distillations / name) for name in names])


def test_a_federation_is_not_compared_with_a_distillation(runs, distillations):
    with pytest.raises(UsageError, match="not of both"):
        compare(runs / "first", distillations / "logits")


def test_options_of_runs_of_methods_are_refused_for_distillations(distillations):
    for options in ({"name": ("kd=KD",)}, {"target": 0.5}, {"by": ("epochs",)}):
        with pytest.raises(UsageError, match=r"are for runs of fedkd\.simulate"):
            compare(distillations / "logits", **options)


def test_curves_of_a_run_are_not_replaced(runs):
    before = {path.name: path.read_bytes() for path in (runs / "first").iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=r"--out .*second is a run directory"):
        compare(runs / "first", out=runs / "second")
    with pytest.raises(UsageError, match=r"--out .*first is a run directory"):
        compare(runs / "first", out=runs / "first")
    assert before == {path.name: path.read_bytes() for path in (runs / "first").iterdir() if path.is_file()}


def test_a_target_and_the_largest_accuracy_with_several_settings(runs, capsys):
    """Each setting has its table of costs; csv and json have the numbers of each run, here with those of its rows."""
    target = 0.1
    settings = (runs / "first", runs / "elsewhere")
    compare(*settings, by=("partitioner",), target=target, largest=True, form="markdown")
    printed = " ".join(capsys.readouterr().out.split())
    assert "largest test accuracy" in printed
    assert printed.count("Until the test accuracy first is 10.0%, the target") == 2
    compare(*settings, by=("partitioner",), target=target, form="json")
    records = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for path in settings for line in (path / "rounds.jsonl").read_text().splitlines()]
    curves = [list(rows) for _, rows in itertools.groupby(lines, lambda row: (row["algorithm"], row["seed"]))]
    assert len(records) == len(curves) > 2
    assert {record["rounds_to_target"] for record in records} != {None}
    for rows, record in zip(curves, records, strict=True):
        first = next((number for number, row in enumerate(rows, 1) if row["test_accuracy"] >= target), None)
        sizes = [row["uplink_serialized_bytes"] + row["downlink_serialized_bytes"] for row in rows]
        assert record["test_accuracy"] == rows[-1]["test_accuracy"]
        assert record["rounds_to_target"] == first
        assert record["bytes_to_target"] == (first and sum(sizes[:first]))
    compare(*settings, by=("partitioner",), target=1.0, form="json")
    assert {record["rounds_to_target"] for record in json.loads(capsys.readouterr().out)} == {None}


def test_a_result_that_lacks_any_key_is_read_or_is_a_sentence(runs, tmp_path):
    """A result of an earlier version, for example."""
    shutil.copytree(runs / "first", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    read_ones = []
    for key in result["runs"][0].keys() - {"algorithm", "seed"}:
        path.write_text(
            json.dumps({**result, "runs": [{k: v for k, v in r.items() if k != key} for r in result["runs"]]})
        )
        try:
            compare(tmp_path / "run")
            read_ones.append(key)
        except DataError as error:
            assert f"result.json has no {key}; it is damaged, or of another version" in str(error)  # noqa: PT017
    assert {"client_test_samples", "best_round", "local_accuracy", "break_even_proxy_size"} <= set(read_ones)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("rounds.jsonl", {"test_accuracy": "high"}),
        ("rounds.jsonl", {"round": "one"}),
        ("rounds.jsonl", {"uplink_serialized_bytes": [1]}),
        ("result.json", {"test_accuracy": "high"}),
        ("result.json", {"training_seconds": {}}),
        ("result.json", {"evaluated_model": None}),
        ("result.json", {"uplink_serialized_bytes": None}),
        ("rounds.jsonl", {"downlink_serialized_bytes": None}),
        ("rounds.jsonl", {"round": None}),
    ],
)
def test_numbers_that_are_none_are_named_damage(runs, tmp_path, file, changes):
    shutil.copytree(runs / "first", tmp_path / "run")
    path = tmp_path / "run" / file
    if file == "result.json":
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "runs": [{**run, **changes} for run in result["runs"]]}))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{json.dumps({**row, **changes})}\n" for row in rows))
    with pytest.raises(
        DataError, match=f"{file} (is damaged|has no {next(iter(changes))}; it is damaged, or of another)"
    ):
        compare(tmp_path / "run")
