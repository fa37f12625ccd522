"""Shared by all tests: a separate cache, the digits data set, and small models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from fedkd.core import errors, run_directory
from fedkd.core.communication.replies import Failure
from fedkd.core.config import Config
from fedkd.core.runtime import settle
from fedkd.simulate import simulate
from fedkd.simulate.experiment import Experiment, prepare

# A shell that starts the tests in the background makes them ignore SIGINT, and so would every process they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "dataset": "digits",
    "proxy": "holdout:size=40",
    "clients": 3,
    "rounds": 2,
    "model": "cnn:width=8",
    "partitioner": "iid",
    "local-epochs": 1,
    "batch-size": 64,
    "learning-rate": 0.01,
    "distill-epochs": 1,
    "device": "cpu",
    "workers": "1",
}


CODED = "bits:bits=2,coder=range,delta=true"  # needs the channel memory in every process
#: User-defined networks that return logits in evaluation, and something else in training.
OTHERWISE_IN_TRAINING = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, classes)
        self.other = nn.Linear(3 * 32 * 32, 1)

    def forward(self, x):
        logits = self.layer(x.flatten(1))
        return self.extended(logits, self.other(x.flatten(1))) if self.training else logits

    def extended(self, logits, more):
        return logits, more

class Wide(Pair):
    def extended(self, logits, more):
        return torch.cat([logits, more], 1)
"""
ROOT = Path(__file__).parents[1]
SAVEFIG = Figure.savefig
#: The browser for the tests of pages; without one they are skipped.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
#: Methods with a mentor on each client, which would be slow by their defaults.
MENTORS = {name: f"{name}:model=cnn:width=4" for name in ("mentor", "fml", "fedkd-wu")}
#: Methods whose server would take hours by their defaults.
DATA_FREE = {name: f"{name}:epochs=2,generator_steps=1,generator_width=4" for name in ("dense", "co-boosting")}
#: Methods that are not run by their defaults.
QUICK = {**MENTORS, **DATA_FREE, "fedgkt": "fedgkt:private-features=true"}
#: A method whose clients would select one or two of the proxy samples of tiny runs.
SELECTING = {"selective-fd": "selective-fd:client-threshold=0,server-threshold=2"}
FLAGS = [part for key, value in TINY.items() for part in (f"--{key}", str(value))]


def tiny(**changes: object) -> Config:
    """A config that runs in seconds: digits, three clients, a small model."""
    return Config.parse({**TINY, **{key.replace("_", "-"): value for key, value in changes.items()}})


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m fedkd.simulate`` in a separate process."""
    command = [sys.executable, "-m", "fedkd.simulate", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k != "FEDKD_DATA"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240, check=False)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Return once the condition holds; the limit only keeps a failing test from hanging."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"the condition does not hold after {seconds:g} seconds")
        time.sleep(0.05)


def is_over(status: Path) -> bool:
    """Whether the process of a file ``/proc/ID/stat`` has ended, waited for or not."""
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def slow(*case: object) -> object:
    """A case of a parametrized test that is left out unless slow tests are asked for."""
    return pytest.param(*case, marks=pytest.mark.slow)


def simulated(out: Path, **changes: object) -> list[dict]:
    """Run in this process; the rows without the times."""
    simulate(tiny(out=str(out), **changes))
    return [
        {k: v for k, v in json.loads(line).items() if "seconds" not in k}
        for line in (out / "rounds.jsonl").read_text().splitlines()
    ]


def is_interrupted_after(rows: int, run: Callable[[], object]) -> bool:
    """Run until so many lines of rounds or epochs are written, and no further; whether there were as many."""
    written = []

    def append(path: Path, row: dict) -> None:
        original(path, row)
        written.append(row)
        if len(written) == rows:
            raise KeyboardInterrupt

    original, run_directory.append = run_directory.append, append
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        run_directory.append = original
    return False


def reasons(failures: Iterable[Failure]) -> dict[int, str]:
    """The reason of each client's failure."""
    return {failure.client: failure.reason for failure in failures}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: those with slow tests, then those with many. The last ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep the tests of a group in one process, and those of a file, which share runs."""
    from xdist.scheduler import LoadGroupScheduling

    class GroupsAndFiles(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    return GroupsAndFiles(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="session")
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ignore options set in the environment; use one cache for the session."""
    patch = pytest.MonkeyPatch()
    for name in list(os.environ):
        if name.startswith("FEDKD_") and name not in ("FEDKD_DATA", "FEDKD_CACHE"):
            patch.delenv(name)
    if "FEDKD_CACHE" not in os.environ:
        patch.setenv("FEDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    # Figures are made, but no image of them: it takes as long as a small run.
    patch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_bytes(b""))
    settle(1)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _handlers_of_signals() -> Iterator[None]:
    """Undo what a command that runs in this process sets: processes that a later test starts would inherit it."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    errors._SIGNALED.clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def images_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(scope="session")
def experiment(_isolated: None) -> Experiment:
    return prepare(tiny())


@pytest.fixture
def data_dir() -> str:
    """The directory of CIFAR-10, for tests marked real."""
    directory = os.environ.get("FEDKD_DATA", "")
    if not directory or not Path(directory).is_dir():
        pytest.skip("FEDKD_DATA does not point to CIFAR-10")
    return directory


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
