"""``python -m fedkd.simulate``: run federated distillation and other methods, and compare them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core import objects, run_directory, runtime
from fedkd.core.errors import FedkdError, UsageError
from fedkd.core.notes import say
from fedkd.data.partitioners import OWN
from fedkd.simulate import checks, faults

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.core.report.rows import Row


def simulate(config: Config) -> Path:
    """Simulate federated distillation.

    Clients train local models and upload soft logits on a public proxy set; the server distills a global student
    from their ensemble.

    Components are given as specs: name:key=value,... for built-in ones (dsfl:temperature=0.1),
    package.module:Name or ./file.py:Name for user-defined ones.
    """
    return _drained(rows(config))


def rows(config: Config) -> Generator[Row, None, Path]:
    """The same round by round: each row of ``rounds.jsonl`` when it is there, and the run directory at the end.

    A run whose rows are not read to the end is interrupted, and can be continued.
    """
    config = _checked(config)
    is_new, config = not config.resume, run_directory.begin(config, config.algorithm)
    out = Path(config.out)
    try:
        yield from (_run_on_ray if config.engine == "ray" else _run_locally)(config)
    except (FedkdError, KeyboardInterrupt, SystemExit, GeneratorExit) as error:
        run_directory.ended(out, error, "simulate", "rounds.jsonl", is_new, objects.only_here(config.run_config()))
        raise
    finally:
        run_directory.unlock(out)
    print(f"run directory: {out}", file=sys.stderr if config.json else sys.stdout, flush=True)
    return out


def estimate(config: Config) -> str:
    """What a run would transmit and take, as a table, or as JSON with ``config.json``. Nothing is written."""
    config = _checked(config)
    if config.resume:
        raise UsageError("--dry-run estimates a run from its start; leave out --resume.")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    is_fresh = "torch" not in sys.modules
    from fedkd.simulate import dry_run

    return dry_run.estimate(config, is_fresh)


def _checked(config: Config) -> Config:
    """The config, after all that cannot be simulated is refused, before torch is imported: within a second."""
    checks.check(config)
    if config.partitioner == OWN:
        raise UsageError("--partitioner own is for deployed nodes, which bring their own data (docs/deployment.md).")
    is_local = config.engine == "local" and not config.resume  # a run on Ray may be resumed here
    if is_local and (config.ray_address or config.client_cpus != 1 or config.client_gpus):
        raise UsageError("--ray-address, --client-cpus and --client-gpus need --engine ray.")
    if config.engine == "ray" and (sys.platform == "win32" or find_spec("ray") is None):
        raise UsageError("--engine ray needs Ray, on Linux or macOS: pip install 'fedkd[ray]'.")
    here = objects.only_here(config.run_config())
    return _in_this_process(config, here) if here else config


def _in_this_process(config: Config, here: str) -> Config:
    """The config with one process, in which what the running program defines is known.

    Raises:
        UsageError: another option needs more of them.

    """
    crashes = faults.parse(config.faults).crash > 0
    others = "--engine ray" if config.engine == "ray" else _isolating(config, 1, crashes)
    if others or config.workers not in ("auto", "1"):
        raise UsageError(
            f"{here} is known only in the process that defines it, but {others or f'--workers {config.workers}'} runs "
            "clients in others; write it into a file, and give that: ./file.py:Name."
        )
    return dataclasses.replace(config, workers="1")


def _drained(left: Generator[Any, None, Path]) -> Path:
    """What a generator returns, after all that it yields."""
    while True:
        try:
            next(left)
        except StopIteration as end:
            return Path(end.value)


def _run_locally(config: Config) -> Iterator[Row]:
    """Run Flower's two apps on this machine."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    is_fresh = "torch" not in sys.modules  # nothing has been computed in this process, so it can be forked
    from fedkd.simulate.flower.local_grid import LocalGrid, count_workers
    from fedkd.simulate.rounds import participants
    from fedkd.training import together

    device, out = runtime.device(config.device), Path(config.out)
    count = count_workers(config.workers, participants(config.clients, config.participation), config.threads, device)
    crashes = faults.parse(config.faults).crash > 0
    if together.pays(device) and (option := _isolating(config, count, crashes)):
        say(f"{option} runs clients in processes of their own; without it they are trained together, which is faster")
    durable = config.checkpoint_every > 0 or (out / "checkpoint").exists()  # those of a resumed run are in it
    with LocalGrid(
        "fedkd.simulate.flower.client_app:app",
        config.clients,
        config.run_config(),
        count,
        timeout=config.client_timeout,
        crashes=crashes,
        fork=is_fresh and device == "cpu" and sys.platform == "linux",
        together=together.pays(device),
        memories=out / ("checkpoint" if durable else "memories"),
        durable=durable,
    ) as grid:
        from fedkd.simulate.flower.server_app import rows_on

        yield from rows_on(grid, config)


def _isolating(config: Config, workers: int, crashes: bool) -> str:
    """The option for which clients cannot run in this process; empty if they can."""
    if config.client_timeout:
        return "--client-timeout"
    if crashes:
        return "--faults crash"
    return f"--workers {workers}" if workers > 1 else ""


def _run_on_ray(config: Config) -> Iterator[Row]:
    """Run them on Ray, in a child process; the rows are in its files."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from fedkd.simulate.flower import ray_engine

    ray_engine.run(config)
    return iter(())
