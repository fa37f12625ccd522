"""Questions that tables, figures and comparisons ask of the rows of a run (keys: docs/output-files.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def common_accuracy(curves: Sequence[Sequence[Row]]) -> float | None:
    """The highest test accuracy that every communicating method reached in some round.

    Only methods that are evaluated in every round count: with ``evaluate_every`` above 1 those without a global
    student are not.
    """
    peaks = []
    for rows in curves:
        reached = [r["test_accuracy"] for r in rows]
        if any(r["uplink_serialized_bytes"] for r in rows) and None not in reached:
            peaks.append(max(reached))
    return min(peaks) if peaks else None


def until(accuracy: float, rows: Sequence[Row]) -> Sequence[Row] | None:
    """The rows of a run up to the first whose test accuracy is at least ``accuracy``.

    None if there is none, or if an earlier round was not evaluated.
    """
    for number, row in enumerate(rows, 1):
        if row["test_accuracy"] is None:
            return None
        if row["test_accuracy"] >= accuracy:
            return rows[:number]
    return None


def sent(rows: Sequence[Row]) -> int:
    """Serialized bytes in both directions."""
    return sum(int(row["uplink_serialized_bytes"] + row["downlink_serialized_bytes"]) for row in rows)


def numbers(rows: Iterable[Row]) -> set[str]:
    """The keys with a number in any of the rows."""
    return {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
