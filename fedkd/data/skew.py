"""The skew of a partition: how much the clients' data differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedkd.data.partition import Partition


@dataclass(frozen=True)
class Skew:
    """Sizes of the clients' shares, distance of their label distributions, and the fraction of assigned samples."""

    smallest: int
    median: int
    largest: int
    distance: float  # mean over clients of the total-variation distance to the global label distribution, 0 to 1
    classes: float  # mean of exp(entropy of a client's labels): the effective number of classes
    coverage: float


def counts(labels: NDArray[np.int64], dealt: Partition, classes: int) -> NDArray[np.int64]:
    """The number of samples per client and class [clients, classes]."""
    cells = np.bincount(dealt.owners * classes + labels[dealt.rows], minlength=len(dealt) * classes)
    return cells.reshape(len(dealt), classes)


def measure(labels: NDArray[np.int64], dealt: Partition, classes: int, rows: int) -> Skew:
    """The skew of a partition of ``rows`` samples."""
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
