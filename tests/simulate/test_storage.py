"""A disk that is full, in simulations and distillations: exit code 74, and the last checkpoint stays.

The limit of the system on the size of a file fails as a full disk does, also for root.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedkd.core import run_directory
from fedkd.core.errors import DataError, StorageError
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig
from fedkd.simulate import checkpoint, simulate
from tests.conftest import tiny
from tests.simulate.test_resume import SMALL, result_of, resume

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
DISTILL = {"dataset": SMALL["dataset"], "student": "cnn:width=8", "teacher": "cnn:width=2", "corrupted_images": 0}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may become larger than ``size`` bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("large", "workers"), [("student", "1"), ("model", "1"), ("model", "2")])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, capsys, large, workers):
    """Where the server's state is written, or the memory of a client."""
    options = {"algorithm": "dsfl", "student": "cnn:width=4", "model": "cnn:width=4", large: "cnn:width=16", **SMALL}
    whole = result_of(simulate(tiny(**options, rounds=3, out=str(tmp_path / "whole"))))
    out = simulate(tiny(**options, rounds=1, out=str(tmp_path / "run")))
    with full_disk(30_000), pytest.raises(StorageError) as caught:
        resume(out, rounds=3, workers=workers)
    assert str(out) in str(caught.value)
    assert ("state-2.safetensors" in str(caught.value)) == (large == "student")
    result = json.loads((out / "result.json").read_text())
    assert (result["status"], result["code"], result["message"]) == ("failed", 74, str(caught.value))
    assert checkpoint.load(out, tiny(**options)).number == 1
    assert f"continue with: python -m fedkd.simulate --resume {out}" in capsys.readouterr().err
    assert not list(out.rglob("*.part*"))
    resume(out, workers="1")
    assert result_of(out) == whole


def test_a_full_disk_leaves_no_half_figure(tmp_path, images_of_figures):
    options = {"algorithm": "fedmd", "model": "cnn:width=2", **SMALL}
    out = simulate(tiny(**options, rounds=1, out=str(tmp_path / "run")))
    before = (out / "curve.png").read_bytes()
    with full_disk(20_000), pytest.raises(StorageError):
        resume(out, rounds=2)
    assert (out / "curve.png").read_bytes() == before
    assert checkpoint.load(out, tiny(**options)).number == 2
    assert not list(out.rglob("*.part*"))


def test_a_full_disk_ends_a_distillation_likewise(tmp_path, capsys):
    out = tmp_path / "run"
    with full_disk(10_000), pytest.raises(StorageError) as caught:
        distill(DistillConfig.parse({**DISTILL, "epochs": 1, "out": str(out)}))
    assert str(out) in str(caught.value)
    result = json.loads((out / "result.json").read_text())
    assert (result["status"], result["code"], result["message"]) == ("failed", 74, str(caught.value))
    assert f"continue with: python -m fedkd.distill --resume {out}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [simulate, distill])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, command):
    out = str(tmp_path / "run")
    config = tiny(out=out) if command is simulate else DistillConfig.parse({**DISTILL, "out": out})
    with full_disk(100), pytest.raises(StorageError, match="run"):
        command(config)
    assert not Path(out).exists()


def test_a_run_that_cannot_be_written_is_not_resumed_and_stays(tmp_path):
    out = simulate(tiny(algorithm="fedmd", **SMALL, out=str(tmp_path / "run")))
    before = result_of(out)
    with full_disk(0), pytest.raises(StorageError, match=re.escape(str(out))):
        resume(out, rounds=3)
    assert result_of(out) == before


def test_the_error_that_ends_a_run_is_not_replaced_by_a_result_that_cannot_be_written(tmp_path, monkeypatch):
    def fails(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_directory, "write_json", fails)
    with pytest.raises(DataError):
        simulate(tiny(dataset="folder:/absent", out=str(tmp_path / "run")))
    with pytest.raises(StorageError, match=r"No space left on device: .*result\.json"):
        run_directory.write_result(tmp_path, {"status": "ok"})
