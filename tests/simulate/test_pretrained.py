"""Clients and student that start from the weights in a file (``MODEL:pretrained=FILE``)."""

from __future__ import annotations

import pytest
import torch

from fedkd.core import run_directory, tensors
from fedkd.core.config import Config
from fedkd.core.errors import DataError, ResumeError, UsageError
from fedkd.simulate import simulate
from fedkd.simulate.experiment import prepare
from fedkd.training import models
from fedkd.training.models import checkpoint
from tests.conftest import simulated, tiny
from tests.simulate.test_resume import result_of, resume


def saved(path, classes: int = 10, model: str = "cnn:width=8", seed: int = 1) -> str:
    """A spec of the model with new weights in a file."""
    torch.manual_seed(seed)
    tensors.save(models.build(model, classes, "group").state_dict(), path)
    return f'{model},pretrained="{path}"'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my models, a=1").mkdir()
    return tmp_path / "my models, a=1"


def test_clients_and_student_start_from_their_files(folder):
    texts = [saved(folder / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    setup = prepare(tiny(model=",".join(texts), student="cnn:width=8")).setup
    starts = [setup.trainer.initial_weights(setup.model_of(client)) for client in range(3)]
    files = [tensors.load(folder / f"{seed}.safetensors") for seed in (1, 2)]
    for start, file in zip(starts, [*files, files[0]], strict=True):
        assert tensors.digest(start) == tensors.digest(file)
    assert tensors.digest(setup.trainer.initial_weights(setup.student)) not in map(tensors.digest, files)


@pytest.mark.parametrize("method", ["fedavg", "ensemble"])
def test_the_student_does_not_need_the_file(method, folder, tmp_path, capsys):
    text = saved(folder / "a.safetensors", classes=7)
    simulated(tmp_path / "run", model=text, algorithm=method, rounds=1)
    shown = capsys.readouterr().err
    note = "a.safetensors has 7 classes, not 10, so the last layer (11) starts with random weights."
    about_files = [line for line in shown.splitlines() if "is not used by" not in line]  # of options, fedavg
    assert about_files == [f"fedkd: {folder}/{note}"]
    (folder / "a.safetensors").unlink()
    student = checkpoint.load(tmp_path / "run")
    assert student.model == "cnn:width=8"
    again = f'{student.model},pretrained="{tmp_path}/run/student.safetensors"'
    start = prepare(tiny(model=again)).setup.trainer.initial_weights(again)
    assert tensors.digest(start) == tensors.digest(student.weights)
    student.module()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"model": "cnn:width=8,pretrained=none.pt"}, DataError, "there is no file none.pt"),
        ({"student": "cnn:width=8,pretrained="}, UsageError, "pretrained= has no file"),
        ({"student": "cnn:width=4,pretrained={file}"}, DataError, r"The weights in .*/A\.safetensors do not fit it: 0"),
        ({"model": "cnn:width=8,pretrained={file},cnn:width=8", "algorithm": "fedavg"}, UsageError, "need one model"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_before_the_first_round(changes, error, expected, tmp_path):
    saved(tmp_path / "A.safetensors")
    named = {key: value.replace("{file}", f"{tmp_path}/A.safetensors") for key, value in changes.items()}
    with pytest.raises(error, match=expected):
        simulate(tiny(out=str(tmp_path / "run"), **named))
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_the_same_file_only(folder, tmp_path):
    options = {"model": saved(folder / "a.safetensors"), "participation": 0.4, "clients": 5}
    simulate(tiny(**options, rounds=3, out=str(tmp_path / "whole")))
    simulate(tiny(**options, rounds=1, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=3)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")
    before = (tmp_path / "parts" / "result.json").read_bytes()
    saved(folder / "a.safetensors", seed=2)
    with pytest.raises(ResumeError, match=r"a\.safetensors changed after the run in .* began; start a new run"):
        resume(tmp_path / "parts", rounds=4)
    assert (tmp_path / "parts" / "result.json").read_bytes() == before


def test_a_file_that_changes_during_a_run_is_refused(tmp_path):
    text = saved(tmp_path / "a.safetensors")
    trainer = prepare(tiny(model=text)).setup.trainer
    (tmp_path / "a.safetensors").unlink()
    saved(tmp_path / "a.safetensors", seed=2)
    with pytest.raises(DataError, match="has changed during the run"):
        trainer.initial_weights(text)


def test_the_text_of_the_option_is_kept(folder, tmp_path):
    text = saved(folder / "a.safetensors")
    config = tiny(model=text)
    (tmp_path / "again.toml").write_text(run_directory.toml(config))
    from fedkd.core.options import from_file

    assert Config.parse(from_file(tmp_path / "again.toml")) == config
