"""Partition: the samples of every client in one array, so that a client costs eight bytes besides its samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from fedkd.core import seeds
from fedkd.core.brief import brief
from fedkd.core.errors import FedkdError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition(Sequence["Rows"]):
    """Client i has the samples ``rows[ends[i - 1] : ends[i]]``; ``ids`` are the clients' own, if the data has any."""

    __repr__ = brief

    rows: Rows
    ends: Rows
    ids: tuple[str, ...] = ()

    @staticmethod
    def of(parts: Iterable[Rows]) -> Partition:
        """A partition from one array of indices per client."""
        arrays = list(parts)
        rows = np.concatenate([np.zeros(0, np.int64), *arrays]).astype(np.int64)
        return Partition(rows, np.cumsum([len(part) for part in arrays], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, client: int) -> Rows: ...
    @overload
    def __getitem__(self, client: slice) -> list[Rows]: ...
    def __getitem__(self, client: int | slice) -> Rows | list[Rows]:
        if isinstance(client, slice):
            return [self[i] for i in range(*client.indices(len(self)))]
        if not -len(self) <= client < len(self):
            raise IndexError(client)
        client %= len(self)
        return self.rows[self.ends[client - 1] if client else 0 : self.ends[client]]

    @property
    def sizes(self) -> Rows:
        """The number of samples of each client."""
        return np.diff(self.ends, prepend=0)

    @property
    def owners(self) -> Rows:
        """The client of each of ``rows``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def sorted(self) -> Partition:
        """The same with each client's samples in ascending order."""
        return dataclasses.replace(self, rows=self.rows[np.lexsort((self.rows, self.owners))])

    def digest(self) -> str:
        """SHA-256 over each client's size and samples, little-endian: the same on every machine."""
        starts = self.ends - self.sizes
        return hashlib.sha256(np.insert(self.rows, starts, self.sizes).astype("<i8").tobytes()).hexdigest()


def held_out(size: int, share: float, seed: int, client: int) -> tuple[Rows, Rows]:
    """The places of a client's samples that it trains on and of those of its local test split, both sorted.

    It trains on at least one.
    """
    count = min(round(share * size), size - 1) if share else 0
    order = seeds.rng(seed, "local-test", client).permutation(size) if count else np.arange(size)
    return np.sort(order[count:]), np.sort(order[:count])


def hold_out(partition: Partition, share: float, seed: int) -> tuple[Partition, Partition]:
    """The samples that each client trains on, and its local test split."""
    if not share:
        return partition, Partition(partition.rows[:0], np.zeros_like(partition.ends))
    parts = []
    for client, rows in enumerate(partition):
        own, held = held_out(len(rows), share, seed, client)
        parts.append((rows[own], rows[held]))
    training, test = (Partition.of(part) for part in zip(*parts, strict=True))
    return dataclasses.replace(training, ids=partition.ids), test


def by_ids(owners: Rows, ids: Sequence[str], group: int) -> Partition:
    """A client for each ``group`` of the ids, in order; ``owners`` [N] are the numbers of the samples' ids.

    Raises:
        UsageError: a client has no samples.

    """
    names = tuple("+".join(ids[start : start + group]) for start in range(0, len(ids), group))
    sizes = np.bincount(owners // group, minlength=len(names))
    if not sizes.all():
        raise UsageError(
            f"All samples of client {names[sizes.argmin()]} are in the proxy or validation set; hold fewer out "
            "(--proxy holdout:size=N, --validation N), take the proxy from another data set, or remove this client."
        )
    return Partition(np.argsort(owners // group, kind="stable"), np.cumsum(sizes), names)


def checked(parts: object, rows: int, clients: int, text: str, kind: type[FedkdError]) -> Partition:
    """The parts with sorted indices, if they are a partition of some of ``rows`` samples; ``text`` is the partitioner.

    Raises:
        FedkdError: of this kind, if they are not.

    """

    def wrong(what: str) -> FedkdError:
        return kind(f"--partitioner {text} {what}.")

    if not isinstance(parts, list | tuple):
        raise wrong(f"returned {type(parts).__name__}, not a list of index arrays")
    if len(parts) != clients:
        raise wrong(f"returned {len(parts)} index arrays for {clients} clients")
    try:
        arrays = [np.asarray(part) for part in parts]
    except (ValueError, TypeError) as error:
        raise wrong("returned something that is no list of index arrays") from error
    for client, array in enumerate(arrays):
        if array.size == 0:
            raise wrong(f"gave client {client} no samples; every client needs at least one")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise wrong(f"gave client {client} {array.dtype} of shape {array.shape}, not a row of integer indices")
    partition = Partition.of(arrays)
    outside = (partition.rows < 0) | (partition.rows >= rows)
    if outside.any():
        client = partition.owners[outside.argmax()]
        raise wrong(f"gave client {client} an index out of range: there are {rows} samples, counted from 0")
    values, counts = np.unique(partition.rows, return_counts=True)
    if len(values) < len(partition.rows):
        raise wrong(f"assigned sample {values[counts > 1][0]} more than once; shares may not overlap")
    return partition.sorted()
