"""``fedkd.doctor``: what it finds, also where packages are missing or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fedkd import doctor
from tests.conftest import ROOT


def examined(tmp_path, **environment):
    """The exit code, and the findings by name, of the command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
    command = [sys.executable, "-m", "fedkd.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=240, check=False)
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert report["works"] == (done.returncode == 0)
    return done.returncode, {each["name"]: each for each in report["findings"]}


def test_here_runs_work(tmp_path):
    code, found = examined(tmp_path, FEDKD_DATA="")
    assert code == 0, found
    assert {each["mark"] for each in found.values()} <= {"ok", "note"}
    assert found["run"]["text"] == "a round of two clients on digits works"
    assert found["torch and torchvision"]["mark"] == "ok"
    assert not list(tmp_path.iterdir())


def test_broken_packages_are_reported(tmp_path):
    """A library that does not load, and an operator that is not there."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code, found = examined(tmp_path)
    assert code == 4
    assert found["torch"]["mark"] == found["torchvision"]["mark"] == "problem"
    assert "libcudart" in found["torch"]["text"]
    assert found["torchvision"]["advice"] == "Install it again: pip install --force-reinstall torchvision"
    assert "run" not in found


def test_a_wrong_pair_and_a_missing_package(monkeypatch):
    versions = {"torch": "2.9.1+cpu", "torchvision": "0.25.0", "ray": "1.0"}
    wanted = {"torchvision": ["numpy", "torch==2.10.0"], "flwr": ["ray==2.55.1; extra == 'simulation'"]}

    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", wanted.get)
    found = doctor.pair()
    assert (found.code, found.advice) == (4, "Install a pair: pip install torch==2.10.0 torchvision==0.25.0")
    assert doctor.ray().advice == "For --engine ray: pip install 'ray==2.55.1'"
    assert doctor.package("safetensors").text == "is not installed"
    versions["torch"] = "2.10.0+cu130"
    assert doctor.pair().mark == "ok"


def test_data_that_is_not_where_it_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    assert doctor.data().code == 3
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert doctor.data().text == f"cifar10 in {tmp_path}/cifar10/cifar-10-batches-py"
    monkeypatch.setenv("FEDKD_DATA", "")
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "empty"))
    assert doctor.data().mark == "note"


@pytest.mark.parametrize(("quota", "mark"), [("max 100000", "ok"), ("50000 100000", "note"), ("6400000 100000", "ok")])
def test_a_limit_of_cores(quota, mark, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(doctor.memory, "CGROUP", tmp_path)
    found = doctor.cores()
    assert found.mark == mark
    assert (found.advice == "Use --workers 1.") == (mark == "note")


def test_a_limit_of_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000000")
    (tmp_path / "memory.current").write_text("400000000")
    monkeypatch.setattr(doctor.memory, "CGROUP", tmp_path)
    assert doctor.free_memory().text == "600 MB free"
    (tmp_path / "memory.max").write_text("max")
    assert doctor.memory.available() > 10**6


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "file"))
    runs, cache = doctor.folders()
    assert (runs.mark, cache.mark) == ("ok", "note")
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**80)
    assert next(doctor.folders()).code == 74


def test_what_a_broken_check_raises_is_a_finding():
    def broken() -> str:
        raise ZeroDivisionError("division by zero")

    assert doctor._checked("run", broken).text == "ZeroDivisionError: division by zero"
