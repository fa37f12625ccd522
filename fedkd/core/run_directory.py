"""Run directories: the output files of a run. Each is written atomically."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fedkd.core.errors import DataError, FedkdError, ResumeError, RunError, StorageError, UsageError
from fedkd.core.options import Options, from_file
from fedkd.core.seeds import derive

AnyOptions = TypeVar("AnyOptions", bound=Options)


def default_out(config: Options, name: str) -> Path:
    """``runs/NAME-TIME-HASH``: the method, the time in UTC, and a hash of config and process."""
    name = name.partition(":")[0].strip('"').rpartition("/")[2].removesuffix(".py")
    tail = f"{derive(time.time_ns(), str(config), os.getpid()):016x}"[-6:]
    return Path("runs") / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{tail}"


def begin(config: AnyOptions, name: str) -> AnyOptions:
    """The config with its run directory, which is created with ``config.toml``, or continued if ``resume`` names it.

    The directory is locked until `unlock` or the end of this process.

    Raises:
        UsageError: another process uses it, or it holds something else.
        StorageError: it cannot be written.

    """
    resume = config.resume
    out = Path(resume or config.out or default_out(config, name))
    config = dataclasses.replace(config, out=str(out), resume="")  # type: ignore[type-var]
    if not resume:
        claim(out)
    try:
        if not resume:
            write(out / "config.toml", toml(config))
        lock(out)
    except OSError as error:
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        raise StorageError.of(error, out) from error
    return config


_LOCKS: dict[str, int] = {}  # run directory -> the open file that holds its lock


def lock(out: Path) -> None:
    """Lock a run directory by the file ``lock``, which names the process. The system releases it if that process ends.

    Raises:
        UsageError: another process has locked it, or another run in this one.

    """
    if str(out.resolve()) in _LOCKS:
        raise UsageError(
            f"{out} is in use by a run of this process: rows of fedkd.rounds that are not read to the end; read them, "
            "or close() them."
        )
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise UsageError(f"{out} is in use by {owner}; wait for its end, or stop it.") from error
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    _LOCKS[str(out.resolve())] = file


def unlock(out: Path) -> None:
    """Release the lock of this process, and remove its file."""
    file = _LOCKS.pop(str(out.resolve()), None)
    if file is not None:
        (out / "lock").unlink(missing_ok=True)
        os.close(file)


def resumed(options: type[AnyOptions], out: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that is continued: those recorded in its directory, and given ones that may differ.

    Raises:
        ResumeError: a given option differs that results depend on, or the run is one of another command.

    """
    if not (out / "config.toml").is_file():
        raise ResumeError(f"{out} is not the directory of a run; there is no {out / 'config.toml'}.")
    if not (out / "checkpoint").is_dir():
        raise ResumeError(f"{out} has no checkpoint; start the run again ({out / 'config.toml'} has its options).")
    try:
        recorded = from_file(out / "config.toml")
        before = options.parse(recorded)
    except UsageError as error:
        raise ResumeError(f"{out / 'config.toml'} is not that of a run of this command.") from error
    if given.get("out") and Path(given["out"]).resolve() != out.resolve():
        raise UsageError(f"--out {given['out']} has no effect with --resume: the run stays in {out}.")
    for key, value in given.items():
        after = options.parse({**recorded, key: value})
        if key not in before.resumable and after != before:
            name, old, new = key.replace("_", "-"), *(_shown(getattr(each, key)) for each in (before, after))
            why = f" ({options.REASONS[key]})" if key in options.REASONS else ""
            raise ResumeError(f"--{name} {new} differs from the run in {out}, which has {old}{why}; start a new run.")
    changed = {key: value for key, value in given.items() if key in before.resumable}
    return {**recorded, **changed, "out": str(out), "resume": str(out)}


def _shown(value: object) -> object:
    return "none" if value == "" else value


def create(out: Path) -> None:
    """Create a directory for output, if there is none.

    Raises:
        UsageError: it cannot be created.

    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created: {error.strerror}.") from error


def claim(out: Path) -> None:
    """Create the run directory; a directory that is not empty is refused.

    Raises:
        UsageError: it is in use, or cannot be created.

    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.toml").exists():
            raise UsageError(
                f"--out {out} is in use: it holds a run ({status(out)}). Continue it by --resume {out}, name another "
                "directory, or remove it."
            )
        if any(out.iterdir()):
            raise UsageError(f"--out {out} is in use: it is not empty. Name another directory, or remove it.")
        os.close(os.open(out / "config.toml", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be created: {error.strerror}.") from error


def status(out: Path) -> str:
    """How the run in a directory ended, in one word: ``ok`` if it is complete."""
    try:
        return str(json.loads((out / "result.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not finished"


def ended(out: Path, error: BaseException, command: str, record: str, is_new: bool, here: str = "") -> None:
    """After an error: remove a new directory if nothing was recorded, so that its name can be used again.

    Otherwise print the command that continues the run, if it can be continued. ``here`` is a component that only this
    program has.
    """
    if is_new and getattr(error, "code", None) != RunError.code and not (out / record).exists():
        shutil.rmtree(out, ignore_errors=True)
    is_resumable = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | RunError | StorageError)
    if is_resumable and (out / "checkpoint").exists():
        how = f"python -m fedkd.{command} --resume {shlex.quote(str(out))}"
        if here:  # another process does not know it
            how = f"fedkd.run(resume={str(out)!r}) in the program that defines {here}"
        print(f"fedkd: continue with: {how}", file=sys.stderr)


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. It is moved there at the end of the block, and deleted after an error."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``. If the run failed and this fails too, the first error is the one that is reported.

    Raises:
        StorageError: the result of a complete run cannot be written.

    """
    try:
        write_json(out / "result.json", result)
    except OSError as error:
        if result["status"] == "ok":
            raise StorageError.of(error, out) from error


def line(row: Mapping[str, object]) -> str:
    """A row of a file that grows line by line, with its line break."""
    return json.dumps(row, allow_nan=False) + "\n"


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one JSON line; earlier lines are never damaged."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line(row))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is read from a file in this block is as fedkd has written it; otherwise there is a `DataError`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: it is not as fedkd has written it.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; a `DataError` if it is damaged."""
    with readable(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file written by `append`. A last line that is incomplete is left out: it was being written.

    Raises:
        DataError: another line is damaged.

    """
    *complete, _ = path.read_bytes().split(b"\n")  # the rest is empty or incomplete
    found = []
    for number, each in enumerate(complete, 1):
        try:
            found.append(dict(json.loads(each)))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged in line {number}.") from error
    return found


def run_name(algorithm: str, seed: int) -> str:
    """The name of one method with one seed in file names; different for different specs."""
    words = "".join(c if c.isalnum() else "-" for c in algorithm).strip("-")[:60]
    return f"{words}-seed{seed}-{derive(seed, algorithm):016x}"


def log(out: Path, row: Mapping[str, object]) -> None:
    """Append to ``errors.jsonl``: failures with their tracebacks."""
    append(out / "errors.jsonl", row)


def toml(config: Options, *, only_changed: bool = False) -> str:
    """The config as a scenario file, whose values are JSON scalars; with or without options that have their default."""
    names = {name.replace("_", "-") for name in config.changed()} if only_changed else config.run_config().keys()
    options = ((key, value) for key, value in config.run_config().items() if key in names)
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in options)


def record_failure(out: Path, error: FedkdError) -> None:
    """Record in ``result.json`` what ended a run: Flower's engines exit with 0 even after a failure."""
    path = out / "result.json"
    result = read_json(path) if path.exists() else {"status": "failed", "out": str(out)}
    write_json(path, {**result, "code": error.code, "message": str(error)})


def read_failure(out: Path) -> FedkdError | None:
    """The error that ended a run, read from ``result.json``; None if there is none."""
    path = out / "result.json"
    result = read_json(path) if path.exists() else {}
    if "code" not in result:
        return None
    error = FedkdError(result["message"])
    error.code = result["code"]
    return error


def student_file(algorithm: str, seed: int) -> str:
    """The file name of a student that is not the first of its run directory."""
    words = "".join(c if c.isalnum() else "-" for c in algorithm).strip("-")
    return f"student-{words}-seed{seed}.safetensors"


def student_files(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], str]:
    """The file of the global student of each method and seed that has one, from ``runs`` of ``result.json``."""
    keys = [(run["algorithm"], run["seed"]) for run in runs if run["evaluated_model"] == "student"]
    return {key: student_file(*key) if place else "student.safetensors" for place, key in enumerate(keys)}
