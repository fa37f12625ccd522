"""When a run ends, and its best round: pure functions of its config and the rows of its rounds."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.core.errors import UsageError, unknown
from fedkd.simulate.evaluation import per_client

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.core.report.rows import Row

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
KINDS = ("serialized", "float32", "encoded", "entropy_bound", "metadata")
#: The numbers in a row of ``rounds.jsonl`` without times, which depend on the machine, and bytes of the evaluation.
KEYS = {
    *(
        "seed",
        "round",
        "participants",
        "attempts",
        "simulated_duration",
        "test_accuracy",
        "test_loss",
        "validation_accuracy",
        "validation_loss",
    ),
    *("teacher_accuracy", "teacher_entropy", "teacher_ece", "teacher_agreement", *per_client.KEYS),
    *(f"uplink_{kind}_bytes" for kind in KINDS),
    *(f"downlink_{kind}_bytes" for kind in KINDS),
}


@dataclass(frozen=True)
class Condition:
    """A condition on a row; it is not met by a row without a value (null)."""

    text: str
    key: str
    compare: Callable[[float, float], bool]
    number: float

    def is_met(self, row: Row) -> bool:
        return row[self.key] is not None and self.compare(row[self.key], self.number)


def conditions(text: str) -> list[Condition]:
    """The conditions of ``--stop-when``, such as ``test_accuracy>=0.6``.

    Raises:
        UsageError: one that cannot be read, or with an unknown key.

    """
    found = []
    for word in re.sub(r"\s*(>=|<=|>|<)\s*", r"\1", text).split():
        parts, number = re.fullmatch(r"([\w-]+)(>=|<=|>|<)([\w.+-]+)", word), math.nan
        with suppress(ValueError):
            number = float(parts[3]) if parts else math.nan
        if parts is None or not math.isfinite(number):
            raise UsageError(
                f"--stop-when {word!r} cannot be read; write KEY>=NUMBER (or <=, >, <) in quotes, "
                "such as 'test_accuracy>=0.6'."
            )
        key = parts[1].replace("-", "_")
        if key not in KEYS:
            raise UsageError(unknown("key of --stop-when", key, KEYS))
        if key.endswith("_accuracy") and not 0 <= number <= 1:
            raise UsageError(f"--stop-when {word}: an accuracy is a fraction from 0 to 1, as in 'test_accuracy>=0.6'.")
        found.append(Condition(word, key, COMPARISONS[parts[2]], number))
    return found


def check(config: Config) -> None:
    """Check ``--patience``, ``--distill-patience`` and ``--stop-when``.

    Raises:
        UsageError: an option that needs ``--validation``, or a condition that cannot be used.

    """
    for option, patience in (("--patience", config.patience), ("--distill-patience", config.distill_patience)):
        if patience and not config.validation:
            raise UsageError(f"{option} {patience} needs --validation N, samples on which to see an improvement.")
    for condition in conditions(config.stop_when):
        if condition.key.startswith("validation") and not config.validation:
            raise UsageError(f"--stop-when {condition.text} needs --validation N, samples on which to measure it.")
        if "local" in condition.key and not config.local_test:
            raise UsageError(f"--stop-when {condition.text} needs --local-test, samples on which to measure it.")


def best(rows: Sequence[Row]) -> Row | None:
    """The first row with the highest validation accuracy; None without a validation set or a global student."""
    measured = [row for row in rows if row.get("validation_accuracy") is not None]
    return max(measured, key=lambda row: row["validation_accuracy"], default=None)


def ended(config: Config, rows: Sequence[Row]) -> str:
    """Why a run ends after its last row: the condition that this row meets, ``patience`` or ``rounds``; else empty."""
    if not rows:
        return ""
    for condition in conditions(config.stop_when):
        if condition.is_met(rows[-1]):
            return condition.text
    top = best(rows)
    if config.patience and top and rows[-1]["round"] - top["round"] >= config.patience:
        return "patience"
    return "rounds" if rows[-1]["round"] >= config.rounds else ""
