"""Run directories: the output files of a run. Each is written atomically."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import fedkd
from fedkd.core.config import Options
from fedkd.core.errors import FedkdError, UsageError
from fedkd.core.seeds import derive

AnyOptions = TypeVar("AnyOptions", bound=Options)


def default_out(config: Options, name: str) -> Path:
    """``runs/NAME-TIME-HASH``: the method, the time in UTC, and a hash of config and process."""
    name = name.partition(":")[0].rpartition("/")[2].removesuffix(".py")
    tail = f"{derive(time.time_ns(), str(config), os.getpid()):016x}"[-6:]
    return Path("runs") / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{tail}"


def begin(config: AnyOptions, name: str) -> AnyOptions:
    """The config with its run directory, which is created with ``config.toml``."""
    out = Path(config.out) if config.out else default_out(config, name)
    config = dataclasses.replace(config, out=str(out))  # type: ignore[type-var]
    claim(out)
    write(out / "config.toml", toml(config))
    return config


def claim(out: Path) -> None:
    """Create the run directory; a directory that is not empty is refused.

    Raises:
        UsageError: it is in use, or cannot be created.

    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"--out {out} is in use: it is not empty. Name another directory, or remove it.")
        os.close(os.open(out / "config.toml", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created: {error.strerror}.") from error


def release(out: Path, record: str = "rounds.jsonl") -> None:
    """Remove a run directory in which nothing was recorded, so that its name can be used again."""
    if not (out / record).exists():
        shutil.rmtree(out, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one JSON line; earlier lines are never damaged."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def log(out: Path, text: str) -> None:
    """Append to ``errors.log``: tracebacks of clients that failed."""
    with (out / "errors.log").open("a", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")


def toml(config: Options) -> str:
    """The config as a scenario file. A JSON scalar is a TOML scalar."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.run_config().items())


def record_failure(out: Path, error: FedkdError) -> None:
    """Record in ``result.json`` what ended a run: Flower's engines exit with 0 even after a failure."""
    path = out / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "failed", "out": str(out)}
    write_json(path, {**result, "code": error.code, "message": str(error)})


def read_failure(out: Path) -> FedkdError | None:
    """The error that ended a run, read from ``result.json``; None if there is none."""
    path = out / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "code" not in result:
        return None
    error = FedkdError(result["message"])
    error.code = result["code"]
    return error


def environment(device: str, dataset: str, fallback: str) -> dict[str, Any]:
    """What results may depend on besides the config: versions, processor, device, data."""
    import torch

    names = ("torch", "torchvision", "numpy", "flwr", "flwr-datasets", "safetensors")
    return {
        "fedkd": fedkd.__version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in names},
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "dataset": dataset,
        "dataset_fallback": fallback,
        "command": sys.argv,
    }


def student_file(algorithm: str, seed: int) -> str:
    """The file name of a student that is not the first of its run directory."""
    words = "".join(c if c.isalnum() else "-" for c in algorithm).strip("-")
    return f"student-{words}-seed{seed}.safetensors"
