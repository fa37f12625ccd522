"""What is measured: each stack is a command that trains the same clients on the same number of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from fedkd.core import cache, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import RunError

PAUSE = 0.1  # seconds between looks at a process tree's memory


@dataclass(frozen=True)
class Work:
    """So many clients with so many images each; one local epoch a round, batches of 32, no evaluation."""

    clients: int = 20
    images: int = 512
    rounds: int = 5
    model: str = "cnn"
    algorithm: str = "fedavg"
    registered: int = 0  # clients there are, if not all take part
    proxy: int = 512

    def config(self, **changes: Any) -> Config:
        """The same work as options of fedkd."""
        registered = self.registered or self.clients
        options: dict[str, Any] = {
            "algorithm": self.algorithm,
            "dataset": f"noise:size={registered * self.images + self.proxy}",
            "proxy": f"holdout:size={self.proxy}",
            "partitioner": "iid",
            "clients": registered,
            "participation": self.clients / registered,
            "rounds": self.rounds,
            "model": self.model,
            "local-epochs": 1,
            "augment": False,
            "evaluate-every": self.rounds + 1,
            "device": "cpu",
        }
        return Config.parse({**options, **{key.replace("_", "-"): value for key, value in changes.items()}})


@dataclass(frozen=True)
class Timing:
    """One run of a stack: seconds of its rounds, of all else, and what its processes held in memory at most."""

    rounds: Sequence[float]
    rest: float
    megabytes: float | None = None
    beyond: float | None = None  # of these, what is not images mapped from the cache on the disk
    bytes: int | None = None  # of the arrays of a round, up and down
    messages: int | None = None  # of a round
    begun: float | None = None  # seconds from the start of the process to the first client's step


def fedkd(work: Work, *, weigh: bool = False, **changes: Any) -> Timing:
    """Fedkd itself, as people run it."""
    with tempfile.TemporaryDirectory() as parent:
        out, scenario = Path(parent) / "run", Path(parent) / "work.toml"
        run_directory.write(scenario, run_directory.toml(work.config(**changes, out=str(out))))
        start = time.time()
        _, whole, held = _run(["-m", "fedkd.simulate", str(scenario)], weigh)
        rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    spent = sum(row["training_seconds"] + row["evaluation_seconds"] for row in rows)
    first = rows[0]["train_metrics"].get("time")
    return Timing(
        [row["training_seconds"] for row in rows],
        whole - spent,
        *held,
        round(fmean(row["uplink_serialized_bytes"] + row["downlink_serialized_bytes"] for row in rows)),
        rows[0]["participants"],
        None if first is None else first - start,
    )


def bare(work: Work, workers: int, *, weigh: bool = False) -> Timing:
    """The arithmetic alone (`fedkd.bench.bare`)."""
    config = work.config().run_config()
    return _foreign(["-m", "fedkd.bench.bare", json.dumps(config), str(workers)], weigh)


def flower(work: Work, cpus: int, *, weigh: bool = False) -> Timing:
    """Flower's stock simulation and strategy, plain PyTorch (`fedkd.bench.flower_stock`)."""
    return _foreign([*_script("flower_stock", work), "--cpus-per-client", str(cpus)], weigh)


def pfl(work: Work, processes: int, *, weigh: bool = False) -> Timing:
    """Apple's pfl-research, plain PyTorch (`fedkd.bench.pfl_stock`)."""
    return _foreign([*_script("pfl_stock", work), "--processes", str(processes)], weigh)


def peak(threads: int) -> Mapping[str, float]:
    """GFLOP a second of a matrix product and of a convolution."""
    speeds: dict[str, float] = json.loads(_run(["-m", "fedkd.bench.peak", str(threads)], False)[0])
    return speeds


def importing(module: str) -> float:
    """Seconds to start Python and import a module."""
    return _run(["-c", f"import {module}"], False)[1]


def is_installed(module: str) -> bool:
    """Whether a library is there, without importing it."""
    return find_spec(module) is not None


def _script(name: str, work: Work) -> list[str]:
    path = Path(__file__).with_name(f"{name}.py")
    return [str(path), "--clients", str(work.clients), "--images", str(work.images), "--rounds", str(work.rounds)]


def _foreign(arguments: list[str], weigh: bool) -> Timing:
    said, whole, held = _run(arguments, weigh)
    seconds = json.loads(said.splitlines()[-1])["rounds"]
    return Timing(seconds, whole - sum(seconds), *held)


Memory = tuple[float | None, float | None]  # megabytes at most: all, and without the images on the disk


def _run(arguments: list[str], weigh: bool) -> tuple[str, float, Memory]:
    """What a Python process prints, its seconds from start to end, and, if asked, its megabytes.

    Weighing disturbs what is timed: it is done in runs of its own.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FEDKD_") or k == "FEDKD_CACHE"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=errors, env=environment)
        most = beyond = 0.0
        while weigh and process.poll() is None:
            total, images = megabytes_of(process.pid)
            most, beyond = max(most, total), max(beyond, total - images)
            time.sleep(PAUSE)
        code = process.wait()
        whole = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if code:
            said = errors.read().strip() or "no reason given"
            raise RunError(f"{' '.join(arguments[:2])} ended with {code}: {said.splitlines()[-1]}", said)
        return out.read().strip(), whole, (most or None, beyond or None)


def megabytes_of(pid: int) -> tuple[float, float]:
    """The proportional set size of a process and all below it, and how much of it is images mapped from the cache.

    Shared pages count once. Linux maps a megabyte of a file that is in memory anyway when one byte is touched.
    """
    import psutil

    total = images = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                for part in process.memory_maps():
                    total += part.pss
                    images += part.pss * part.path.startswith(str(cache.directory()))
    return total / 1e6, images / 1e6
