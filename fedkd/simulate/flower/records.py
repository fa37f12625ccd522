"""Tensors as array records of Flower and back, and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors

ARRAYS, CONFIG, METRICS, MEMORY, OWNER = "arrays", "config", "metrics", "memory", "owner"


def to_record(tensors: Tensors, cache: dict[int, Array] | None = None) -> ArrayRecord:
    """Each tensor as one array, in NumPy's own format, under its own name.

    ``cache`` holds arrays of tensors that are serialized already, by id(), and takes up new ones: what all
    clients receive is serialized once.
    """
    cache = {} if cache is None else cache
    for tensor in tensors.values():
        if id(tensor) not in cache:
            cache[id(tensor)] = Array(tensor.contiguous().numpy())
    return ArrayRecord({name: cache[id(tensor)] for name, tensor in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record. Nothing is unpickled: NumPy refuses objects."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


def count_bytes(content: RecordDict) -> tuple[int, int]:
    """Bytes of the array records as serialized, with names and headers; and of all other records."""
    arrays = rest = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            arrays += record.count_bytes()
        elif isinstance(record, ConfigRecord | MetricRecord):
            rest += record.count_bytes()
    return arrays, rest
