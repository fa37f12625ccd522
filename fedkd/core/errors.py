"""Errors for people: one sentence and an exit code (docs/exit-codes.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

LINE = 300  # characters of a client's text that are shown
TEXT = 10_000  # characters of a client's text that are kept


class FedkdError(Exception):
    """A mistake that the user can correct. The message says what is wrong and what to do.

    ``details`` are written to ``errors.jsonl``: tracebacks of user-defined code.
    """

    code = 1

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class UsageError(FedkdError):
    """An option, a scenario file or a combination of them cannot be used."""

    code = 2


class ArgumentError(UsageError, ValueError):
    """An argument of a config cannot be used; in Python."""


class DataError(FedkdError):
    """Data is missing, unreadable or wrong."""

    code = 3


class RunError(FedkdError):
    """A run cannot continue."""

    code = 4


class ResumeError(FedkdError):
    """A run cannot be continued: its options differ, or its checkpoint cannot be used."""

    code = 6


class PluginError(FedkdError):
    """A user-defined component cannot be imported, or breaks its contract."""

    code = 7


class StorageError(FedkdError):
    """A file could not be written."""

    code = 74

    @classmethod
    def of(cls, error: OSError, where: object = "cannot write") -> StorageError:
        """The system's error message as a sentence with the file; ``where`` if the system does not name it."""
        where = "standard output" if isinstance(error, BrokenPipeError) else where
        return cls(f"{error.strerror or error}: {error.filename or where}.")


class Terminated(SystemExit):
    """SIGTERM arrived, or the reader of the output is gone; not an exit that user-defined code requests."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A type of its own, since CPython ends by SIGINT and not with the exit code if KeyboardInterrupt itself passed
    through `exec` (as in a dataclass), even if it is handled later.
    """


_SIGNALED: list[Interrupted | Terminated] = []  # of this process


def end_by_signal(error: Interrupted | Terminated) -> NoReturn:
    """Raise what a signal asks for, and remember it: C++ code, or a client that fails by it, can lose an exception."""
    _SIGNALED[:] = [error]
    raise error


def check_signaled() -> None:
    """Raise again what a signal has asked for."""
    if _SIGNALED:
        raise _SIGNALED[0]


@contextmanager
def noticing_signals() -> Iterator[None]:
    """A block in which an error after a signal is that of the signal."""
    try:
        yield
    except Exception:
        check_signaled()
        raise


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message with the unknown name, the nearest known name, and all known names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


def last_line(failure: str) -> str:
    """The end of a traceback, which is what a person wants to read, in at most `LINE` printable characters."""
    line = (printable(failure).strip().splitlines() or ["no reason given"])[-1].rstrip(".")
    line = re.sub(r"^fedkd\.core\.errors\.\w+: ", "", line)  # our own errors are sentences
    return line if len(line) <= LINE else f"{line[:LINE]}…"


def printable(text: str, limit: int = TEXT) -> str:
    """A text that came from a client: without control characters, and only its end if it is longer than ``limit``."""
    end = text if len(text) <= limit else f"…{text[-limit:]}"
    return "".join(character if character.isprintable() or character == "\n" else " " for character in end)
