"""Notes for the user: one line each on standard error."""

from __future__ import annotations

import multiprocessing
import sys
from functools import lru_cache


@lru_cache
def say(text: str) -> None:
    """Print a line once, and not from each of the processes that simulate clients."""
    if multiprocessing.parent_process() is None:
        print(f"fedkd: {text}", file=sys.stderr)


def say_unused(option: str, by: str) -> None:
    """Print that an option, which was given, has no effect."""
    say(f"--{option.replace('_', '-')} is not used by {by}.")


def plain(count: int, noun: str) -> str:
    """``1 client``, ``20 clients``, ``40,000 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
