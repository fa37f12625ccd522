"""Scenario files with several settings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from fedkd.compare import sweep
from fedkd.compare.__main__ import compare
from fedkd.core import cli
from fedkd.core.errors import UsageError
from fedkd.core.subruns import complete, has_ended
from fedkd.simulate.__main__ import app as simulate
from tests.conftest import ROOT, tiny

SCENARIO = """
dataset = "digits"
clients = 3
rounds = 1
local-epochs = 1
seeds = 2
algorithm = "local"
[sweep]
partitioner = ["iid", "dirichlet:alpha=1"]
model = "cnn:width=4"
[names]
local = "Local training"
"""


def scenario(folder, *changes):
    text = SCENARIO
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "table.toml").write_text(text)
    return folder / "table.toml"


def test_each_setting_method_and_seed_is_a_run(tmp_path):
    changed = scenario(tmp_path, ('"cnn:width=4"', '"cnn:width=4"\nalgorithm = ["local", "central"]\nseeds = 3'))
    planned = sweep.read(changed)
    found = [(cell.config.partitioner, cell.config.seed, cell.config.algorithm) for cell in planned.cells]
    settings = ("iid", "dirichlet:alpha=1")
    assert found == [(p, s, a) for p in settings for s in (0, 1, 2) for a in ("local", "central")]
    assert {cell.config.model for cell in planned.cells} == {"cnn:width=4"}
    assert all((cell.config.seeds, cell.config.compare) == (1, "") for cell in planned.cells)
    assert (planned.by, planned.labels) == (["partitioner"], {"local": "Local training"})


def test_a_run_directory_is_named_by_what_gives_its_numbers(tmp_path, monkeypatch):
    """With another option it is another one; the machine does not count."""
    before = [cell.name for cell in sweep.read(scenario(tmp_path)).cells]
    assert len(set(before)) == 4
    again = sweep.read(scenario(tmp_path, ("seeds = 2", "seeds = 3\nworkers = 2")))
    assert before == [cell.name for cell in again.cells if cell.config.seed < 2]
    rounded = sweep.read(scenario(tmp_path, ("seeds = 2", 'seeds = 2\nprecision = "bfloat16"\ndevice = "cuda"')))
    assert not set(before) & {cell.name for cell in rounded.cells}, "but what is computed with does"
    longer = [cell.name for cell in sweep.read(scenario(tmp_path, ("rounds = 1", "rounds = 2"))).cells]
    assert not set(before) & set(longer)
    monkeypatch.setenv("FEDKD_ROUNDS", "2")
    assert [cell.name for cell in sweep.read(scenario(tmp_path)).cells] == longer, "a variable counts as the option"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("[sweep]", "[sweep]\npartitoner = []"), "table.toml: partitoner has no value in .sweep."),
        (("[sweep]", "[sweep]\npartitoner = [1]"), "Unknown key in .sweep. of .*'partitoner'"),
        (('"dirichlet:alpha=1"', '"dirichlet:alpha=x"'), "table.toml: local, dirichlet:alpha=x, cnn:width=4, seed 0: "),
        (("[sweep]", "[sweep]\nseed = [1, 2]"), "seed is no option that a sweep may vary"),
        (("[sweep]", "[sweep]\nworkers = [1, 2]"), "workers is no option that a sweep may vary"),
        (("[sweep]", "[sweep]\nseeds = [1, 2]"), "seeds is one number in .sweep."),
        (("[sweep]", "[sweeep]"), "Unknown table 'sweeep'. Did you mean 'sweep'"),
        (("[sweep]\n", "sweep = 1\n[other]\n"), "sweep is a table: write .sweep."),
        (('"Local training"', "3"), "table.toml: the name of local in .names. is 3; write a text"),
        (('"Local training"', '""'), "the name of local in .names. is ''; write a text"),
        (('"dirichlet:alpha=1"', '"iid"'), "table.toml has a run twice: local, iid, cnn:width=4, seed 0; remove one"),
        (("local =", "locl ="), "Unknown method or value in .names. 'locl'. Did you mean 'local'"),
        (("clients = 3", "clients = 0"), "clients 0 in .*table.toml is not usable"),
        (("clients = 3", "clients = [3, 4]"), "clients .3, 4. in .*is not usable"),
    ],
)
def test_a_mistake_in_a_scenario_file(tmp_path, change, expected):
    with pytest.raises(UsageError, match=expected):
        sweep.read(scenario(tmp_path, change))


def test_a_scenario_file_stands_alone(tmp_path):
    with pytest.raises(UsageError, match="A scenario file stands alone"):
        compare(scenario(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="Unknown method or value in --name 'locl'"):  # before anything is run
        compare(scenario(tmp_path), out=tmp_path / "out", name=("locl=Local",))
    with pytest.raises(UsageError, match="Two settings have the name 'A'"):
        compare(scenario(tmp_path), out=tmp_path / "out", name=("iid=A", "dirichlet:alpha=1=A"))
    assert not (tmp_path / "out").exists()


def test_a_scenario_file_with_a_sweep_is_not_one_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(simulate, [str(scenario(tmp_path))])
    assert ended.value.code == 2
    assert "has a table [sweep]: run it by python -m fedkd.compare" in capsys.readouterr().err


def test_what_has_ended_is_not_run_again_and_what_was_interrupted_is(tmp_path):
    """Twice the same command, the second time after one run has lost its result, and with one more seed."""
    path, out = scenario(tmp_path, ("seeds = 2", "seeds = 1")), tmp_path / "out"
    command = [sys.executable, "-m", "fedkd.compare", str(path), "--out", str(out), "--format", "markdown"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert first.returncode == 0, first.stderr
    runs = sorted(path for path in out.iterdir() if path.is_dir())
    assert [json.loads((run / "result.json").read_text())["status"] for run in runs] == ["ok", "ok"]
    assert {path.name for path in out.iterdir()} >= {"curve-1.png", "curve-2.svg", "curve-2.pdf"}
    table = first.stdout
    assert table.startswith("| method |"), "of the runs, nothing is on standard output"
    assert table.splitlines()[2].startswith("| Local training* | ")
    before = [(run / "rounds.jsonl").stat().st_mtime_ns for run in runs]
    result = json.loads((runs[0] / "result.json").read_text())
    (runs[0] / "result.json").write_text(json.dumps({**result, "status": "interrupted"}))
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == table
    assert "1 of 2: local, iid" not in again.stderr
    assert "2 of 2: local, dirichlet:alpha=1" in again.stderr
    assert json.loads((runs[0] / "result.json").read_text())["status"] == "ok"
    assert (runs[1] / "rounds.jsonl").stat().st_mtime_ns == before[1]


def test_an_interrupted_run_ends_in_order(tmp_path, monkeypatch, capfd):
    """Also if only this process is interrupted: the run is told, and has time to save its state."""
    saving = "trap 'sleep 0.5; touch saved; exit 143' TERM; until [ -e waiting ]; do sleep 0.05; done; kill -INT $PPID"
    saving += "; while :; do sleep 0.05; done"
    (tmp_path / "run.sh").write_text(f"#!/bin/sh\n{saving}\n")
    (tmp_path / "run.sh").chmod(0o755)

    class Waiting(subprocess.Popen):
        def wait(self, timeout=None):
            (tmp_path / "waiting").touch()
            return super().wait(timeout)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "./run.sh")
    monkeypatch.setattr(subprocess, "Popen", Waiting)
    (tmp_path / "out").mkdir()  # an empty directory is no run
    with pytest.raises(KeyboardInterrupt):
        complete("simulate", tiny(), tmp_path / "out", "a run")
    assert (tmp_path / "saved").exists()
    assert "the same command goes on with this table" in capfd.readouterr().err
    assert (tmp_path / "out.toml").exists(), "it was to start, not to continue"


def test_a_damaged_result_is_that_of_no_run(tmp_path):
    for held in ("null", "[]", "{}", "{"):
        (tmp_path / "result.json").write_text(held)
        assert not has_ended(tmp_path)


def test_the_options_of_a_run_are_those_that_differ_from_the_defaults(tmp_path, monkeypatch):
    """Else a run would say of each option that its method does not use it."""
    from fedkd.core import subruns

    written = []
    monkeypatch.setattr(subruns.run_directory, "write", lambda path, text: written.append(text))
    monkeypatch.setattr(subruns.subprocess, "Popen", lambda *_, **__: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        sweep.run(sweep.read(scenario(tmp_path)), tmp_path / "out")
    keys = {line.split(" = ")[0] for line in written[0].splitlines()}
    assert keys - {"data-dir"} == {"algorithm", "dataset", "clients", "rounds", "local-epochs", "partitioner", "model"}
