"""Runs of a table, each in a process of its own: what has ended is not run again, what was interrupted is resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from fedkd.core import run_directory, runtime
from fedkd.core.errors import RunError
from fedkd.core.options import Options


def complete(command: str, config: Options, out: Path, about: str) -> None:
    """Run ``fedkd.COMMAND`` to its end in the directory ``out``, unless it has ended. ``about`` names it in messages.

    What it prints is on standard error.

    Raises:
        RunError: the run ended with an error, which it has printed, and with this code.

    """
    if has_ended(out):
        return
    if (out / "config.toml").exists() and not (out / "checkpoint").is_dir():  # it was killed before its first round
        run_directory.lock(out)
        shutil.rmtree(out)
        run_directory.unlock(out)
    arguments, scenario = ["--resume", str(out)], out.with_suffix(out.suffix + ".toml")
    if not (out / "config.toml").exists():
        run_directory.create(out.parent)
        run_directory.write(scenario, run_directory.toml(config, only_changed=True))
        arguments = [str(scenario), "--out", str(out)]
    print(f"{about}:", file=sys.stderr)
    end_with_this = partial(runtime.end_with, os.getpid()) if os.name == "posix" else None  # no run is left behind
    words = [sys.executable, "-m", f"fedkd.{command}", *arguments]
    stderr = 2  # standard output is for the table
    with subprocess.Popen(words, stdout=stderr, preexec_fn=end_with_this) as child:
        try:
            code = child.wait()
            if code in (130, 143):
                raise KeyboardInterrupt
        except (KeyboardInterrupt, SystemExit):
            child.terminate()  # after Ctrl-C it is ending already, and ignores this
            child.wait()
            print("fedkd: the same command goes on with this table.", file=sys.stderr)
            raise
    if code:
        goes_on = "the same command goes on from there" if (out / "checkpoint").is_dir() else "it has said why"
        error = RunError(f"The run of {about} ended with code {code}; {goes_on}.")
        error.code = code if code > 0 else RunError.code  # negative: of a signal
        raise error


def has_ended(out: Path) -> bool:
    """Whether a run directory holds a run that is complete."""
    return run_directory.status(out) == "ok"
