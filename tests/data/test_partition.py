from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import partitioners, skew
from fedkd.data.partition import Partition

parts_ = st.lists(st.lists(st.integers(0, 10**9), max_size=6), min_size=1, max_size=8)


@settings(deadline=None)
@given(parts_)
def test_it_is_a_sequence_of_its_parts(parts):
    held = Partition.of([np.array(part, dtype=np.int64) for part in parts])
    assert [part.tolist() for part in held] == parts
    assert [part.tolist() for part in held[1:]] == parts[1:]
    assert held[-1].tolist() == parts[-1]
    assert held.sizes.tolist() == [len(part) for part in parts]
    assert held.owners.tolist() == [i for i, part in enumerate(parts) for _ in part]
    assert [part.tolist() for part in held.sorted()] == [sorted(part) for part in parts]
    with pytest.raises(IndexError):
        held[len(parts)]


@settings(deadline=None)
@given(parts_)
def test_its_digest_is_that_of_sizes_and_rows_one_client_at_a_time(parts):
    sha = hashlib.sha256()
    for part in parts:
        sha.update(np.int64(len(part)).astype("<i8").tobytes() + np.array(part, dtype="<i8").tobytes())
    assert Partition.of([np.array(part, dtype=np.int64) for part in parts]).digest() == sha.hexdigest()


@settings(deadline=None)
@given(parts_.filter(lambda parts: all(parts)))
def test_counts_are_those_of_a_loop(parts):
    labels = np.arange(50) % 4
    held = Partition.of([np.array(part, dtype=np.int64) % 50 for part in parts])
    assert skew.counts(labels, held, 4).tolist() == [np.bincount(labels[part], minlength=4).tolist() for part in held]


@pytest.mark.parametrize("clients", [1, 7, 20])
def test_iid_equals_flowers_partitioner(clients):
    """Without its seconds: by hand here, by the library there."""
    labels = np.random.default_rng(0).integers(0, 10, 103)
    ours = partitioners.assign("iid", labels, clients, seed=3)
    theirs = partitioners._by_flower(partitioners.iid(), "iid", labels, clients, 3)
    assert [part.tolist() for part in ours] == [sorted(part) for part in theirs]


def test_a_million_clients_are_two_arrays():
    dealt = partitioners.assign("iid", np.zeros(1_000_000, dtype=np.int64), 1_000_000, seed=0)
    assert len(dealt) == 1_000_000
    assert dealt.rows.nbytes + dealt.ends.nbytes == 16_000_000
    assert sorted(dealt.rows[:1000].tolist()) != dealt.rows[:1000].tolist()
