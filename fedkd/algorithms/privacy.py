"""What can be said of privacy in numbers."""

from __future__ import annotations

from math import log


def noise_free(rows: int, samples: int, replacement: bool) -> tuple[float, float]:
    """The (epsilon, delta) of training on ``samples`` rows drawn at random (Sun and Lyu, 2021, theorems 2 and 3)."""
    if replacement:
        return samples * log((rows + 1) / rows), 1 - ((rows - 1) / rows) ** samples
    return log((rows + 1) / (rows + 1 - samples)), samples / rows
