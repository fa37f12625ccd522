"""``python -m fedkd.simulate``: the main job."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd import experiment, runs
from fedkd.errors import DataError, PluginError, UsageError

if TYPE_CHECKING:
    from fedkd.config import Config


def simulate(config: Config) -> None:
    """Simulate federated distillation.

    Clients answer a public proxy set with soft logits; the server distills a global student from the
    ensemble they make.

    Components are named by specs: name:key=value,... for built-in ones (dsfl:temperature=0.1),
    package.module:Name or ./file.py:Name for your own.
    """
    experiment.check(config)  # before torch is imported: a mistake is answered within a second
    out = Path(config.out) if config.out else runs.default_out(config)
    config = dataclasses.replace(config, out=str(out))
    runs.claim(out)
    runs.write(out / "config.toml", runs.toml(config))
    stream = sys.stderr if config.json else sys.stdout
    print(f"run directory: {out}", file=stream, flush=True)
    try:
        _play(config)
    except (UsageError, DataError, PluginError):
        runs.release(out)
        raise
    print(f"run directory: {out}", file=stream, flush=True)
    if config.json:
        print((out / "result.json").read_text(encoding="utf-8"), end="")


def _play(config: Config) -> None:
    """Run Flower's two apps on this machine."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    is_fresh = "torch" not in sys.modules  # nothing was computed in this process: it can be forked
    from flwr.app import Context, RecordDict

    from fedkd.flower.grid import LocalGrid, count_workers
    from fedkd.flower.turns import RUN_ID, SERVER

    device = experiment.device(config.device)
    workers = count_workers(config.workers, config.clients, config.threads, device)
    run_config = config.run_config()
    with LocalGrid(
        "fedkd.flower.client_app:app",
        config.clients,
        run_config,
        workers,
        timeout=config.client_timeout,
        fork=is_fresh and device == "cpu" and sys.platform == "linux",
        disk=Path(config.out),
    ) as grid:
        from fedkd.flower import server_app

        server_app.app(grid, Context(RUN_ID, SERVER, {}, RecordDict(), run_config))


if __name__ == "__main__":
    from fedkd.cli import main

    main(simulate)
