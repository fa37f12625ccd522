"""Partitions of papers that flwr-datasets does not have. ``order`` are all samples, shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedkd.data.partition import Partition

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

GROUP = 10  # clients among whom FedDF's code divides a class
DRAWS = 10_000  # until every client has enough


def equal_dirichlet(labels: Rows, order: Rows, clients: int, alpha: float, rng: np.random.Generator) -> Partition:
    """As FedDF's code: the samples of groups, client by client, are one row that is cut into equal parts.

    Raises:
        ValueError: in many draws some client had too few samples.

    """
    groups = [min(GROUP, clients - first) for first in range(0, clients, GROUP)]
    cuts = np.cumsum(groups)[:-1] * len(labels) // clients
    pieces = []
    for part, size in zip(np.split(order, cuts), groups, strict=True):
        classes = [part[labels[part] == label] for label in np.unique(labels)]
        counts = _balanced(list(map(len, classes)), size, alpha, rng)
        shares = [np.split(rows, np.cumsum(count)[:-1]) for rows, count in zip(classes, counts, strict=True)]
        pieces += [share[client] for client in range(size) for share in shares]
    each = len(labels) // clients
    return Partition(np.concatenate(pieces)[: each * clients], np.arange(1, clients + 1) * each)


def _balanced(sizes: Sequence[int], clients: int, alpha: float, rng: np.random.Generator) -> list[Rows]:
    """How many samples of each class each client gets; one with an equal share or more gets none of later classes.

    All is drawn anew until every client has half of an equal share.
    """
    share = sum(sizes) / clients
    for _ in range(DRAWS):
        table: list[Rows] = []
        held = np.zeros(clients, dtype=np.int64)
        for size in sizes:
            part = rng.dirichlet(np.full(clients, alpha)) * (held < share)
            if not part.sum() > 0:  # a tiny alpha: all of the class for one that has enough
                break
            ends = (np.cumsum(part / part.sum()) * size).astype(np.int64)
            ends[-1] = size
            table.append(np.diff(ends, prepend=0))
            held += table[-1]
        if len(table) == len(sizes) and held.min() >= int(share / 2):
            return table
    raise ValueError(f"in {DRAWS:,} draws some client had less than half of its equal share; use a larger alpha")


def few_shot(
    labels: Rows, order: Rows, clients: int, ways: int, shots: int, spread: int, rng: np.random.Generator
) -> Partition:
    """As FedProto's code: both numbers are uniform; at least two classes, unless fewer are asked for.

    Raises:
        ValueError: there are too few classes, or too few samples of one.

    """
    kinds = np.unique(labels)
    least, most = min(max(2, ways - spread), ways), min(len(kinds), ways + spread)
    if least > most:
        raise ValueError(f"they have {len(kinds)} classes, and each client should have {least} or more")
    numbers = rng.integers(least, most, clients, endpoint=True)
    counts = rng.integers(max(1, shots - spread), shots + spread, clients, endpoint=True)
    left = {label: order[labels[order] == label] for label in kinds}
    parts = []
    for number, count in zip(numbers, counts, strict=True):
        chosen = rng.choice(kinds, number, replace=False)
        for label in chosen:
            if len(left[label]) < count:
                raise ValueError(f"class {label} has too few samples for {shots} shots; use fewer shots or clients")
        parts.append(np.concatenate([left[label][:count] for label in chosen]))
        left |= {label: left[label][count:] for label in chosen}
    return Partition.of(parts)


def table(file: str) -> Rows:
    """The numbers of samples [clients, classes] in a CSV file without a header.

    Raises:
        ValueError: it cannot be read, a number is not one, or a client has no samples.

    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        found = np.array([line.split(",") for line in lines if line.strip()]).astype(np.int64)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file} needs a line for each client with whole numbers, one for each class") from error
    if not found.size or found.min() < 0 or not found.sum(1).all():
        raise ValueError(f"a line of {file} has a number below zero, or a client without samples")
    return found


def counts(labels: Rows, order: Rows, table: Rows) -> Partition:
    """As many samples of each class for each client as a table [clients, classes] says.

    Raises:
        ValueError: there are other classes, or too few samples of one.

    """
    if (classes := labels.max() + 1) != table.shape[1]:
        raise ValueError(f"the file has numbers for {table.shape[1]} classes, and they have {classes}")
    pieces = []
    for label, numbers in enumerate(table.T):
        rows = order[labels[order] == label]
        if len(rows) < numbers.sum():
            raise ValueError(f"class {label} has {len(rows):,} samples, and the file has {numbers.sum():,}")
        pieces.append(np.split(rows, np.cumsum(numbers))[:-1])
    return Partition.of([np.concatenate(of_client) for of_client in zip(*pieces, strict=True)])
