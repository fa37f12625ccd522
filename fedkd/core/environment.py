"""``env.json``: what results may depend on besides the config, kept with a run and compared when it is resumed."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedkd
from fedkd.core import run_directory
from fedkd.core.errors import DataError, ResumeError

#: Those on which results may depend.
PACKAGES = ("torch", "torchvision", "numpy", "flwr", "flwr-datasets", "safetensors")


def keep(out: Path, device: str, precision: str, dataset: str, fallback: str, inputs: Mapping[str, str]) -> str:
    """Write ``env.json``; or, if a run is resumed, a sentence on what differs now, empty if nothing does.

    ``inputs`` are hashes of the data and of files of pretrained weights, by their names.

    Raises:
        ResumeError: one of these has changed, or the precision.

    """
    now = environment(device, precision, dataset, fallback) | {"inputs": dict(inputs)}
    if not (out / "env.json").exists():
        run_directory.write_json(out / "env.json", now)
        return ""
    try:
        before = dict(json.loads((out / "env.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{out / 'env.json'} is damaged; remove it to continue the run.") from error
    if changed := sorted(dict(inputs.items() - before.get("inputs", inputs).items())):
        raise ResumeError(f"{' and '.join(changed)} changed after the run in {out} began; start a new run.")
    if (began := before.get("precision", precision)) != precision:
        raise ResumeError(
            f"The run in {out} began in {began} and would continue in {precision}; add --precision {began}, on a "
            "device that has it, or start a new run."
        )
    keys = ("fedkd", "python", "packages", "processor", "device")
    changed = [key for key in keys if before.get(key) != now[key]]
    if not changed:
        return ""
    return f"The run began with other versions or hardware ({', '.join(changed)}), so the last bits may differ."


def environment(device: str, precision: str, dataset: str, fallback: str) -> dict[str, Any]:
    """What results may depend on besides the config: versions, processor, device, precision, data."""
    import torch

    return {
        "fedkd": fedkd.__version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "precision": precision,
        "dataset": dataset,
        "dataset_fallback": fallback,
        "command": sys.argv,
    }
