"""Commands in processes that have imported everything when they begin: imports take most of the time of a tiny run."""

from __future__ import annotations

import multiprocessing
import os
from functools import partial
from importlib import import_module

from fedkd.core import cli
from fedkd.simulate.flower import local_grid

IMPORTED = ["fedkd.simulate.__main__", "fedkd.simulate.flower.local_grid", "fedkd.training.together"]
IMPORTED += ["tests.forked", "fedkd.distill.__main__", "fedkd.distill.runner", "matplotlib.figure"]


class Forked:
    """``python -m fedkd.COMMAND FLAGS`` without its standard output, as a process that can be killed."""

    def __init__(self, command: str, flags: list[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._process = context.Process(target=_run, args=(command, flags, dict(os.environ)))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _forking(made: type[local_grid.LocalGrid], *arguments: object, **options: object) -> local_grid.LocalGrid:
    return made(*arguments, **{**options, "fork": True})


def _run(command: str, flags: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)  # it may have changed since the process was started that this one is forked from
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # PyTorch is imported, but nothing has been computed: as in a new process, workers can be forked from this one.
    local_grid.LocalGrid = partial(_forking, local_grid.LocalGrid)
    cli.run(import_module(f"fedkd.{command}.__main__").app, flags)
