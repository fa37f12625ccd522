"""Resuming a distillation: the same bits as without an interruption, whatever is distilled and after any kill."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkd.core import cli, run_directory, tensors
from fedkd.core.errors import DataError, ResumeError, UsageError
from fedkd.core.options import from_file
from fedkd.distill import distill, progress, runner, teachers
from fedkd.distill.config import DistillConfig
from fedkd.distill.task import prepare
from tests.conftest import is_interrupted_after, wait_for
from tests.forked import Forked
from tests.simulate.test_resume import changed, command

SMALL = {
    "dataset": "noise:size=150,pixels=8",
    "student": "cnn:width=2",
    "teacher": "cnn:width=4,cnn:width=4",
    "loss": "features contrastive:negatives=8,width=4",
    "epochs": 3,
    "corrupted_images": 0,
    "batch_size": 16,
    "device": "cpu",
}
ROWS = 4 * 3  # two teachers, baseline and student
RUNS = {
    "adapters and a memory of embeddings": {},
    "no momentum": {"momentum": 0, "loss": "logits"},
    "born-again networks": {"teacher": "", "loss": "self:generations=3"},
    "exits": {"teacher": "", "loss": "exits:layers=0+3"},
    "several seeds": {"seeds": 2, "teacher": "cnn:width=4", "loss": "graph features:kind=vid"},
    "checkpoints every two epochs": {"checkpoint_every": 2},
    "user-defined networks with dropout": {"student": f"{__name__}:Dropout", "teacher": f"{__name__}:Dropout"},
}


def Dropout(*, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(3 * 8 * 8, classes))


@pytest.fixture(autouse=True)
def _no_latency(monkeypatch):
    """It takes most of the time of these runs."""
    monkeypatch.setattr("fedkd.training.quality.latency", lambda *_: {"median": 0.0, "low": 0.0, "high": 0.0})


def run(out: Path, **changes: object) -> Path:
    """A run with a cache of its own, since networks from the cache have no epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKD_CACHE", f"{out}-cache")
        return distill(DistillConfig.parse({**SMALL, **changes, "out": str(out)}))


def resume(out: Path, **changes: object) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKD_CACHE", f"{out}-cache")
        given = {"resume": str(out), **changes}
        return distill(DistillConfig.parse(run_directory.resumed(DistillConfig, out, given)))


def result_of(out: Path) -> dict[str, object]:
    """Everything that must not depend on interruptions."""
    result = json.loads((out / "result.json").read_text())
    for each in result["runs"]:
        for evaluation in each["evaluation"].values():
            del evaluation["latency_ms"]
    rows = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    return {
        "rows": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "result": {key: value for key, value in result.items() if key != "out"},
        "students": {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))},
    }


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_that_was_interrupted_everywhere_has_the_bits_of_one_that_was_not(tmp_path, changes):
    whole, out = result_of(run(tmp_path / "whole", **changes)), tmp_path / "parts"
    assert is_interrupted_after(1 + changes.get("checkpoint_every", 1), lambda: run(out, **changes))
    while is_interrupted_after(4, lambda: resume(out)):
        pass
    assert result_of(out) == whole
    resume(out)
    assert result_of(out) == whole, "nothing is left to do"


def test_a_seed_that_is_finished_is_not_run_again(tmp_path, monkeypatch):
    changes = {"seeds": 2, "teacher": "cnn:width=4"}
    whole = result_of(run(tmp_path / "whole", **changes))
    out, seeds = tmp_path / "parts", []
    assert is_interrupted_after(3 * 4, lambda: run(out, **changes))  # teacher, baseline, student, baseline
    assert len(list(out.glob("*.safetensors"))) == 2
    evaluate = runner.quality.evaluate
    monkeypatch.setattr(runner.quality, "evaluate", lambda *a, **k: (seeds.append(k["seed"]), evaluate(*a, **k))[1])
    resume(out)
    assert seeds == [1]
    assert result_of(out) == whole


def test_a_teacher_from_the_cache_is_kept_with_the_run(tmp_path):
    out = run(tmp_path / "run", epochs=1)
    whole = result_of(out)
    second = tmp_path / "second"
    shutil.copytree(f"{out}-cache", f"{second}-cache")
    assert is_interrupted_after(1, lambda: run(second, epochs=1))  # the student: all else is in the cache
    shutil.rmtree(f"{second}-cache")
    resume(second)
    assert result_of(second)["students"] == whole["students"]
    assert [row["network"] for row in result_of(second)["rows"]] == ["student seed0"]


def test_networks_of_the_same_name_are_told_apart(tmp_path):
    rows = result_of(run(tmp_path / "run", epochs=1))["rows"]
    assert [row["network"] for row in rows] == ["cnn:width=4", "cnn:width=4 (2)", "baseline seed0", "student seed0"]


def rows_of(out: Path) -> int:
    file = out / "epochs.jsonl"
    return len(run_directory.rows(file)) if file.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("start", "kills"), [(command, 1), (Forked, 3)])
def test_a_run_that_was_killed_has_the_bits_of_one_that_was_not(tmp_path, start, kills, monkeypatch):
    whole = result_of(run(tmp_path / "whole"))
    out, source = tmp_path / "killed", random.Random(kills)
    monkeypatch.setenv("FEDKD_CACHE", f"{out}-cache")
    flags = [part for key, value in {**SMALL, "out": out}.items() for part in (f"--{key}", str(value))]
    for kill in range(kills + 1):
        process = start("distill", ["--resume", str(out)] if kill else flags)
        if kill == kills:
            assert process.wait(240) == 0
            break
        before = rows_of(out) if kill else 0
        wait_for(lambda: rows_of(out) > before or process.poll() is not None)  # noqa: B023
        time.sleep(source.uniform(0.03, 0.1))
        process.kill()
        process.wait()
    assert result_of(out) == whole
    assert not (out / "lock").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "run"
    assert is_interrupted_after(ROWS - 1, lambda: run(out))
    return out


@pytest.fixture
def copied(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def test_the_command_that_continues_is_printed(tmp_path, capsys):
    assert is_interrupted_after(2, lambda: run(tmp_path / "run"))
    assert f"continue with: python -m fedkd.distill --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 30}, r"--epochs 30 differs from .*, which has 3 \(the learning rate of each epoch depends on it\)"),
        ({"teacher_epochs": 4}, r"--teacher-epochs 4 differs .* \(the learning rate of each epoch depends on it\)"),
        ({"loss": "logits"}, "--loss logits differs from the run in"),
        ({"corrupted_images": 10}, "--corrupted-images 10 differs"),
    ],
)
def test_options_that_change_results_may_not_differ(copied, changes, expected):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=expected):
        resume(copied, **changes)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


def test_options_that_change_no_result_may_differ_and_are_recorded(copied):
    shutil.copytree(copied, copied.with_name("other"))
    resume(copied.with_name("other"))
    resume(copied, checkpoint_every=0, data_dir="elsewhere")
    assert result_of(copied)["students"] == result_of(copied.with_name("other"))["students"]
    recorded = from_file(copied / "config.toml")
    assert (recorded["checkpoint_every"], recorded["data_dir"], recorded["resume"]) == (0, "elsewhere", "")


def test_a_run_of_another_command_is_refused(copied, capsys):
    from fedkd.simulate.__main__ import app

    with pytest.raises(SystemExit) as end:
        cli.run(app, ["--resume", str(copied)])
    assert end.value.code == ResumeError.code
    assert "config.toml is not that of a run of this command" in capsys.readouterr().err


def test_other_data_and_other_teachers_are_refused(tmp_path, monkeypatch):
    teacher = run(tmp_path / "teacher", teacher="", loss="exits:layers=0+3", epochs=1) / "student.safetensors"
    out = tmp_path / "run"
    assert is_interrupted_after(5, lambda: run(out, teacher=str(teacher), loss="logits"))  # in the student
    other = tensors.read(teacher)
    tensors.save({name: tensor + (tensor.is_floating_point()) for name, tensor in other[0].items()}, teacher, other[1])
    result = (out / "result.json").read_bytes()
    with pytest.raises(ResumeError, match="has a student seed0 of other data or other teachers"):
        resume(out)
    monkeypatch.setattr(runner, "prepare", lambda config, prepare=runner.prepare: _other(*prepare(config)))
    with pytest.raises(ResumeError, match="has a baseline seed0 of other data"):
        resume(out)
    assert (out / "result.json").read_bytes() == result


def _other(task: object, fallback: str) -> tuple[object, str]:
    task.train.pixels[0, 0, 0, 0] ^= 1
    return task, fallback


def test_students_of_the_run_itself_are_no_candidates(tmp_path):
    run(tmp_path / "runs" / "first", teacher="", loss="exits:layers=0+3", epochs=1)
    options = {"teacher": "", "teachers_from": str(tmp_path / "runs"), "loss": "logits", "seeds": 2}
    whole = result_of(run(tmp_path / "runs" / "second", **options))
    for name in ("second", "second-cache"):
        shutil.rmtree(tmp_path / "runs" / name)
    assert is_interrupted_after(8, lambda: run(tmp_path / "runs" / "second", **options))  # in the second seed
    assert (tmp_path / "runs" / "second" / "student.safetensors").exists()
    resume(tmp_path / "runs" / "second")
    assert result_of(tmp_path / "runs" / "second") == whole


def test_lines_that_are_missing_are_reported(copied):
    lines = (copied / "epochs.jsonl").read_text().splitlines(keepends=True)
    (copied / "epochs.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(DataError, match=r"epochs.jsonl lacks epochs"):
        resume(copied)
    assert (copied / "epochs.jsonl").read_text() == "".join(lines[:4])


def test_without_checkpoints_nothing_is_kept(tmp_path):
    out = run(tmp_path / "run", checkpoint_every=0, epochs=1)
    assert not (out / "checkpoint").exists()
    with pytest.raises(ResumeError, match="has no checkpoint; start the run again"):
        resume(out)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_of_a_checkpoint_is_refused_or_changes_nothing(interrupted, tmp_path_factory, data):
    """Flipped bytes, truncations and edited JSON; nothing is written before it is noticed."""
    out = shutil.copytree(interrupted, tmp_path_factory.mktemp("changed") / "run")
    config = DistillConfig.parse({**SMALL, "out": str(out)})
    whole = progress.Progress(config, None)
    whole.restore()
    rows = (out / "epochs.jsonl").read_bytes()
    changed(data.draw(st.sampled_from(sorted((out / "checkpoint").glob("*/*")))), data)
    found = progress.Progress(config, None)
    try:
        found.restore()
    except (DataError, ResumeError) as error:
        assert str(out) in str(error)  # noqa: PT017
    else:
        assert [about for about, _ in found._found.values()] == [about for about, _ in whole._found.values()]
        for (_, state), (_, expected) in zip(found._found.values(), whole._found.values(), strict=True):
            assert tensors.equal(state, expected)
    assert (out / "epochs.jsonl").read_bytes() == rows


def test_a_run_keeps_its_precision(interrupted, tmp_path, capsys):
    out = shutil.copytree(interrupted, tmp_path / "run")
    environment = json.loads((out / "env.json").read_text())
    assert environment["precision"] == "float32"
    (out / "env.json").write_text(json.dumps({**environment, "precision": "tf32"}))
    with pytest.raises(ResumeError, match=r"began in tf32 and would continue in float32; add --precision tf32"):
        resume(out)
    with pytest.raises(UsageError, match="--precision tf32 cannot be used on cpu"):
        resume(out, precision="tf32")
    (out / "env.json").write_text(json.dumps(environment))
    resume(out, precision="float32")
    assert "device  cpu, float32" in capsys.readouterr().out


def test_teachers_of_another_precision_are_not_taken_from_the_cache(tmp_path):
    config = DistillConfig.parse({**SMALL, "out": str(tmp_path)})
    task, _ = prepare(config)
    keys = {
        teachers._key(dataclasses.replace(task, device=device, precision=precision), config, "cnn", 3)
        for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "tf32"), ("cuda", "bfloat16"))
    }
    assert len(keys) == 4


def test_pretrained_weights_that_changed_are_refused(tmp_path):
    first = run(tmp_path / "first", loss="logits")
    weights = tmp_path / "weights.safetensors"
    shutil.copy(first / "student.safetensors", weights)
    student = f'cnn:width=2,pretrained="{weights}"'
    other = run(tmp_path / "other", loss="logits", student=student)
    shutil.copy(other / "student.safetensors", weights)
    with pytest.raises(ResumeError, match=f"{weights} changed after the run in {other} began"):
        resume(other)
