"""fedkd: a simulator of federated distillation. Names of the Python API are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm as Algorithm
    from fedkd.algorithms.base import Client as Client
    from fedkd.algorithms.base import Setup as Setup
    from fedkd.algorithms.base import Update as Update
    from fedkd.core.config import Config as Config
    from fedkd.distill import distill as run_distillation
    from fedkd.distill.config import DistillConfig as DistillConfig
    from fedkd.models.checkpoint import load as load_student
    from fedkd.simulate import simulate as run_simulation

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Client",
    "Config",
    "DistillConfig",
    "Setup",
    "Update",
    "load_student",
    "run_distillation",
    "run_simulation",
]

_PLACES = {
    "Algorithm": "fedkd.algorithms.base:Algorithm",
    "Client": "fedkd.algorithms.base:Client",
    "Config": "fedkd.core.config:Config",
    "DistillConfig": "fedkd.distill.config:DistillConfig",
    "Setup": "fedkd.algorithms.base:Setup",
    "Update": "fedkd.algorithms.base:Update",
    "load_student": "fedkd.models.checkpoint:load",
    "run_distillation": "fedkd.distill:distill",
    "run_simulation": "fedkd.simulate:simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedkd' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)
