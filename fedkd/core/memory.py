"""Memory of this machine and of processes, as far as the system says it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a container, in both versions of control groups
UNLIMITED = 2**60


def used() -> int | None:
    """Bytes of RAM of this process and its descendants, pages that they share counted once; None if not known."""
    total = 0
    for pid in [os.getpid(), *_descendants(os.getpid())]:
        with suppress(OSError, StopIteration):  # it has ended meanwhile
            lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total or None


def _descendants(pid: int) -> Iterator[int]:
    for task in PROC.glob(f"{pid}/task/*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from _descendants(child)


def available() -> int | None:
    """Bytes of RAM that a new process can use: of the machine, or less in a container; None if not known."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return None
    return min([free, *_left_in_container()])


def _left_in_container() -> list[int]:
    """What the limit of a container leaves; nothing without a limit."""
    for limit, usage in zip(LIMITS, ("memory.current", "memory/memory.usage_in_bytes"), strict=True):
        with suppress(OSError, ValueError):
            most = int((CGROUP / limit).read_text())
            if most < UNLIMITED:
                return [max(0, most - int((CGROUP / usage).read_text()))]
    return []
