"""fedkd: a simulator of federated distillation. Names of the Python API are imported when they are used."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm as Algorithm
    from fedkd.algorithms.base import Client as Client
    from fedkd.algorithms.base import Setup as Setup
    from fedkd.algorithms.base import Update as Update
    from fedkd.compare.run import Run as Run
    from fedkd.compare.run import load as load
    from fedkd.compare.run import rounds as rounds
    from fedkd.compare.run import run as run
    from fedkd.core.config import Config as Config
    from fedkd.core.errors import FedkdError as FedkdError
    from fedkd.core.errors import UsageError as UsageError
    from fedkd.distill import distill as run_distillation
    from fedkd.distill.config import DistillConfig as DistillConfig
    from fedkd.simulate import simulate as run_simulation
    from fedkd.training.models.checkpoint import load as load_student

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Client",
    "Config",
    "DistillConfig",
    "FedkdError",
    "Run",
    "Setup",
    "Update",
    "UsageError",
    "load",
    "load_student",
    "rounds",
    "run",
    "run_distillation",
    "run_simulation",
]

_PLACES = {
    "Algorithm": "fedkd.algorithms.base:Algorithm",
    "Client": "fedkd.algorithms.base:Client",
    "Config": "fedkd.core.config:Config",
    "DistillConfig": "fedkd.distill.config:DistillConfig",
    "FedkdError": "fedkd.core.errors:FedkdError",
    "Run": "fedkd.compare.run:Run",
    "Setup": "fedkd.algorithms.base:Setup",
    "Update": "fedkd.algorithms.base:Update",
    "UsageError": "fedkd.core.errors:UsageError",
    "load": "fedkd.compare.run:load",
    "load_student": "fedkd.training.models.checkpoint:load",
    "rounds": "fedkd.compare.run:rounds",
    "run": "fedkd.compare.run:run",
    "run_distillation": "fedkd.distill:distill",
    "run_simulation": "fedkd.simulate:simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedkd' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


def _end_at_once(signum: int, frame: object) -> None:
    """End a command that is still importing modules; `fedkd.core.cli.run` replaces this."""
    sys.stderr.write("fedkd: interrupted.\n" if signum == signal.SIGINT else "fedkd: terminated.\n")
    sys.stderr.flush()
    os._exit(128 + signum)


def _is_command(words: list[str]) -> bool:
    """Whether Python was started as ``python -m fedkd.NAME`` or by the console script ``fedkd``."""
    if words[1:2] == ["-m"]:
        return words[2].startswith("fedkd.") and words[2].count(".") == 1
    return os.path.basename("".join(words[1:2])) == "fedkd"


if _is_command(sys.orig_argv):
    for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(_number) is _default:
            signal.signal(_number, _end_at_once)
