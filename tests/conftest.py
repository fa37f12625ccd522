"""Shared by all tests: a cache of their own, digits, and models small enough for a laptop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedkd.core.config import Config
from fedkd.core.runtime import settle
from fedkd.simulate import simulate
from fedkd.simulate.experiment import Experiment, prepare

TINY = {
    "dataset": "digits",
    "proxy": "holdout:size=40",
    "clients": 3,
    "rounds": 2,
    "model": "cnn:width=8",
    "partitioner": "iid",
    "local-epochs": 1,
    "distill-epochs": 1,
    "device": "cpu",
    "workers": "1",
}


CODED = "bits:bits=2,coder=range,delta=true"  # what each end remembers must follow it into every process
ROOT = Path(__file__).parents[1]
FLAGS = [part for key, value in TINY.items() for part in (f"--{key}", str(value))]


def tiny(**changes: object) -> Config:
    """A run of seconds: digits, three clients, a small model."""
    return Config.parse({**TINY, **{key.replace("_", "-"): value for key, value in changes.items()}})


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedkd.simulate", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k != "FEDKD_DATA"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240, check=False)


def simulated(out: Path, **changes: object) -> list[dict]:
    """Run in this process; the rows without the times."""
    simulate(tiny(out=str(out), **changes))
    return [
        {k: v for k, v in json.loads(line).items() if "seconds" not in k}
        for line in (out / "rounds.jsonl").read_text().splitlines()
    ]


@pytest.fixture(autouse=True, scope="session")
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No option of the person who runs the tests leaks in; one cache for the session."""
    patch = pytest.MonkeyPatch()
    for name in list(os.environ):
        if name.startswith("FEDKD_") and name not in ("FEDKD_DATA", "FEDKD_CACHE"):
            patch.delenv(name)
    if "FEDKD_CACHE" not in os.environ:
        patch.setenv("FEDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    settle(1)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def experiment(_isolated: None) -> Experiment:
    return prepare(tiny())


@pytest.fixture
def data_dir() -> str:
    """Where CIFAR-10 is, for tests marked real."""
    found = os.environ.get("FEDKD_DATA", "")
    if not found or not Path(found).is_dir():
        pytest.skip("FEDKD_DATA does not point to CIFAR-10")
    return found


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
