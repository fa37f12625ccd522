"""Runs that were played apart, in one table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from fedkd.compare import read
from fedkd.errors import UsageError
from tests.conftest import ROOT, play


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    play(root / "both", algorithm="ensemble", compare="fedavg", seeds=2)
    play(root / "first", algorithm="ensemble", seeds=2)
    play(root / "second", algorithm="fedavg", seeds=2)
    play(root / "elsewhere", algorithm="local", partitioner="linear")
    shutil.copytree(root / "second", root / "other")
    result = json.loads((root / "other" / "result.json").read_text())
    for one in result["runs"]:
        one["partition_sha256"] = "of other images"
    (root / "other" / "result.json").write_text(json.dumps(result))
    for name, held in (("stopped", {"runs": [], "dataset": "digits"}), ("empty", {})):
        shutil.copytree(root / "first", root / name)
        (root / name / "result.json").write_text(json.dumps(held))
    return root


def steady(row):
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_runs_played_apart_are_those_played_together(runs):
    together, apart = read((runs / "both",)), read((runs / "first", runs / "second"))

    def ordered(finished):
        return sorted(map(steady, finished), key=lambda run: (run["algorithm"], run["seed"]))

    assert ordered(together[0]) == ordered(apart[0])
    assert together[1].keys() == apart[1].keys()
    for key, rows in together[1].items():
        assert list(map(steady, rows)) == list(map(steady, apart[1][key]))


def test_the_command_writes_markdown_and_a_figure(runs, tmp_path):
    command = [sys.executable, "-m", "fedkd.compare", runs / "first", runs / "second", "--markdown", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| method | test acc | - fedavg |")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("first", "both"), "is in two of the runs"),
        (("first", "elsewhere"), "differ in partitioner"),
        (("first", "other"), "deals other images than .* with seed 0"),
        (("stopped",), "finished no method"),
        (("empty",), "is not the directory of a run"),
        (("first", "nowhere"), "is not the directory of a run"),
    ],
)
def test_runs_that_do_not_go_together(runs, names, says):
    with pytest.raises(UsageError, match=says):
        read(tuple(runs / name for name in names))
