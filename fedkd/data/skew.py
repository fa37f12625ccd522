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


def counts(labels: NDArray[np.int64], partition: Partition, classes: int) -> NDArray[np.int64]:
    """The number of samples per client and class [clients, classes]."""
    cells = np.bincount(partition.owners * classes + labels[partition.rows], minlength=len(partition) * classes)
    return cells.reshape(len(partition), classes)


def measure(labels: NDArray[np.int64], partition: Partition, classes: int, rows: int) -> Skew:
    """The skew of a partition of ``rows`` samples."""
    return of_counts(counts(labels, partition, classes), rows)


def of_counts(table: NDArray[np.int64], rows: int) -> Skew:
    """The skew of a partition of ``rows`` samples, from its `counts` [clients, classes]."""
    sizes = table.sum(1)
    distributions = table / sizes[:, None]
    entropies = -(distributions * np.log(np.where(distributions > 0, distributions, 1))).sum(1)
    return Skew(
        smallest=int(sizes.min()),
        median=int(np.median(sizes)),
        largest=int(sizes.max()),
        distance=float(distances(table).mean()),
        classes=float(np.exp(entropies).mean()),
        coverage=float(sizes.sum() / rows),
    )


def distances(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """The total-variation distance of each client's labels [clients, classes] to those of all clients [clients]."""
    overall = table.sum(0) / table.sum()
    result: NDArray[np.float64] = 0.5 * np.abs(table / table.sum(1)[:, None] - overall).sum(1)
    return result
