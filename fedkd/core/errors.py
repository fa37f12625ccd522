"""What a person sees when something is wrong: one sentence and an exit code (docs/exit-codes.md)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedkdError(Exception):
    """A mistake a person can mend. The message says what is wrong and what to do.

    ``details`` are for a log: tracebacks of somebody's code.
    """

    code = 1

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class UsageError(FedkdError):
    """An option, a scenario file or a combination of them cannot be used."""

    code = 2


class DataError(FedkdError):
    """Data is missing, unreadable or not what it should be."""

    code = 3


class RunError(FedkdError):
    """A run could not go on."""

    code = 4


class PluginError(FedkdError):
    """Somebody's own component cannot be imported, or broke its contract."""

    code = 7


class StorageError(FedkdError):
    """A file could not be written."""

    code = 74

    @classmethod
    def of(cls, error: OSError) -> StorageError:
        """What the system said, as a sentence."""
        return cls(f"{error.strerror or error}: {error.filename or 'cannot write'}.")


class Terminated(SystemExit):
    """Asked to end by SIGTERM; told apart from an exit that somebody's own code asks for."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence naming what is unknown, the nearest known name, and all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


def last_line(failure: str) -> str:
    """The end of a traceback, which is what a person wants to read; all of it goes to ``errors.log``."""
    return (failure.strip().splitlines() or ["no reason given"])[-1].rstrip(".")
