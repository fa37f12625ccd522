"""How uneven a partition is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedkd.data.partition import Partition


@dataclass(frozen=True)
class Skew:
    """Sizes of the shares; class mix of a client against everybody's; share of the rows dealt."""

    smallest: int
    median: int
    largest: int
    distance: float  # mean over clients of the total variation distance, 0 (alike) to 1
    classes: float  # mean of exp(entropy of a client's labels): how many classes it has in effect
    coverage: float


def counts(labels: NDArray[np.int64], dealt: Partition, classes: int) -> NDArray[np.int64]:
    """Rows of each class that each client holds [clients, classes]."""
    cells = np.bincount(dealt.owners * classes + labels[dealt.rows], minlength=len(dealt) * classes)
    return cells.reshape(len(dealt), classes)


def measure(labels: NDArray[np.int64], dealt: Partition, classes: int, rows: int) -> Skew:
    """The skew of a partition of ``rows`` rows."""
    table = counts(labels, dealt, classes)
    sizes = table.sum(1)
    mixes = table / sizes[:, None]
    everybody = table.sum(0) / table.sum()
    entropies = -(mixes * np.log(np.where(mixes > 0, mixes, 1))).sum(1)
    return Skew(
        smallest=int(sizes.min()),
        median=int(np.median(sizes)),
        largest=int(sizes.max()),
        distance=float(0.5 * np.abs(mixes - everybody).sum(1).mean()),
        classes=float(np.exp(entropies).mean()),
        coverage=float(sizes.sum() / rows),
    )
