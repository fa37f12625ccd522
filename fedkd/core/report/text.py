"""Numbers as text, with units."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def size(count: float | None) -> str:
    """Bytes in decimal units, three digits: ``200 kB``, ``1.23 MB``."""
    if count is None:
        return "–"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: ``51.3%``."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def spread(mean: float | None, std: float | None = None) -> str:
    """A fraction with its standard deviation over seeds, in percent: ``51.3% ±0.4``."""
    return percent(mean) + ("" if mean is None or std is None else f" ±{100 * std:.1f}")


def points(differences: Sequence[float]) -> str:
    """Differences of fractions in percentage points, their mean and standard deviation: ``+2.5 ±1.4``."""
    spread = f" ±{100 * stdev(differences):.1f}" if len(differences) > 1 else ""
    return f"{100 * fmean(differences):+.1f}{spread}"


def seconds(value: float) -> str:
    """A duration: ``12.3 s``, ``4.5 min``."""
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"
