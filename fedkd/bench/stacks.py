"""The measured stacks. Each is a command that trains the same clients on the same number of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from fedkd.core import cache, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import RunError

PAUSE = 0.1  # seconds between measurements of the memory of a process tree


@dataclass(frozen=True)
class Work:
    """The workload: clients, images of each, rounds; one local epoch per round, batches of 32, no evaluation."""

    clients: int = 20
    images: int = 512
    rounds: int = 5
    model: str = "cnn"
    algorithm: str = "fedavg"
    registered: int = 0  # number of clients if not all are sampled; 0 for all
    proxy: int = 512
    device: str = "cpu"

    def config(self, **changes: Any) -> Config:
        """The config of fedkd for this workload."""
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
            "checkpoint-every": 0,  # as the other stacks
            "device": self.device,
        }
        return Config.parse({**options, **{key.replace("_", "-"): value for key, value in changes.items()}})


@dataclass(frozen=True)
class Timing:
    """One run of a stack: seconds of each round and of the rest, and the peak memory of its processes."""

    rounds: Sequence[float]
    seconds_outside_rounds: float
    megabytes: float | None = None
    megabytes_without_images: float | None = None  # peak memory without images mapped from the cache on disk
    bytes: int | None = None  # of the arrays per round, uplink and downlink
    messages: int | None = None  # per round
    seconds_to_first_client: float | None = None  # seconds from the start of the process to the first client
    evaluations: Sequence[float] = ()  # seconds of the evaluation after each round, of fedkd only


def fedkd(work: Work, *, with_memory: bool = False, **changes: Any) -> Timing:
    """Fedkd by its usual command."""
    with tempfile.TemporaryDirectory() as parent:
        out, scenario = Path(parent) / "run", Path(parent) / "work.toml"
        run_directory.write(scenario, run_directory.toml(work.config(**changes, out=str(out))))
        start = time.time()
        _, total, memory = _run(["-m", "fedkd.simulate", str(scenario)], with_memory)
        rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    rounds, evaluations = ([row[f"{what}_seconds"] for row in rows] for what in ("training", "evaluation"))
    first = rows[0]["train_metrics"].get("time")
    return Timing(
        rounds,
        total - sum(rounds) - sum(evaluations),
        *memory,
        round(fmean(row["uplink_serialized_bytes"] + row["downlink_serialized_bytes"] for row in rows)),
        rows[0]["participants"],
        None if first is None else first - start,
        evaluations,
    )


def whole(work: Work, **options: Any) -> Timing:
    """Fedkd by its usual command, with all of its time divided among the rounds: a checkpoint is written after one."""
    timing = fedkd(work, **options)
    count = len(timing.rounds)
    total = sum(timing.rounds) + timing.seconds_outside_rounds
    return replace(timing, rounds=[total / count] * count, seconds_outside_rounds=0.0)


def bare(work: Work, workers: int, *, with_memory: bool = False) -> Timing:
    """Only the arithmetic (`fedkd.bench.bare`)."""
    config = work.config().run_config()
    return _foreign(["-m", "fedkd.bench.bare", json.dumps(config), str(workers)], with_memory)


def flower(work: Work, cpus: int, gpus: float = 0.0, *, with_memory: bool = False) -> Timing:
    """Flower's stock simulation and strategy, plain PyTorch (`fedkd.bench.flower_stock`)."""
    resources = ["--cpus-per-client", str(cpus), "--gpus-per-client", str(gpus)]
    return _foreign([*_script("flower_stock", work), *resources], with_memory)


def pfl(work: Work, processes: int, *, with_memory: bool = False) -> Timing:
    """Apple's pfl-research, plain PyTorch (`fedkd.bench.pfl_stock`)."""
    return _foreign([*_script("pfl_stock", work), "--processes", str(processes)], with_memory)


def peak(threads: int) -> Mapping[str, float]:
    """GFLOP/s of a matrix product and of a convolution."""
    speeds: dict[str, float] = json.loads(_run(["-m", "fedkd.bench.peak", str(threads)], False)[0])
    return speeds


def importing(module: str) -> float:
    """Seconds to start Python and import a module."""
    return _run(["-c", f"import {module}"], False)[1]


def is_installed(module: str) -> bool:
    """Whether a library is installed, without importing it."""
    return find_spec(module) is not None


def _script(name: str, work: Work) -> list[str]:
    path = Path(__file__).with_name(f"{name}.py")
    options = {"clients": work.clients, "images": work.images, "rounds": work.rounds, "device": work.device}
    return [str(path), *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def _foreign(arguments: list[str], with_memory: bool) -> Timing:
    output, total, memory = _run(arguments, with_memory)
    seconds = json.loads(output.splitlines()[-1])["rounds"]
    return Timing(seconds, total - sum(seconds), *memory)


Memory = tuple[float | None, float | None]  # peak megabytes: in total, and without images mapped from disk


def _run(arguments: list[str], with_memory: bool) -> tuple[str, float, Memory]:
    """The output of a Python process, its duration in seconds, and its peak memory if ``with_memory``.

    Measuring memory slows the process down, so it is done in separate runs.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FEDKD_") or k == "FEDKD_CACHE"}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=errors, env=environment)
        peak_total = peak_private = 0.0
        while with_memory and process.poll() is None:
            total, images = megabytes_of(process.pid)
            peak_total, peak_private = max(peak_total, total), max(peak_private, total - images)
            time.sleep(PAUSE)
        code = process.wait()
        duration = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if code:
            message = errors.read().strip() or "no error message"
            raise RunError(f"{' '.join(arguments[:2])} exited with {code}: {message.splitlines()[-1]}", message)
        return out.read().strip(), duration, (peak_total or None, peak_private or None)


def megabytes_of(pid: int) -> tuple[float, float]:
    """The proportional set size of a process and its children, and the part that is images mapped from the cache.

    Shared pages count once. Touching one byte makes Linux map the surrounding pages that are in the page cache.
    """
    import psutil

    total = images = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                for region in process.memory_maps():
                    total += region.pss
                    images += region.pss * region.path.startswith(str(cache.directory()))
    return total / 1e6, images / 1e6
