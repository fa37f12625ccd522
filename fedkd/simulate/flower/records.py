"""Tensors as Flower's array records and back, and what they weigh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Tensors

ARRAYS, CONFIG, METRICS, MEMORY, OWNER = "arrays", "config", "metrics", "memory", "owner"


def to_record(tensors: Tensors, made: dict[int, Array] | None = None) -> ArrayRecord:
    """Each tensor as one array, in NumPy's own format, under its own name.

    ``made`` holds arrays of tensors that went to somebody else, and takes up the new ones: what all
    clients are sent is serialized once.
    """
    made = {} if made is None else made
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = Array(tensor.contiguous().numpy())
    return ArrayRecord({name: made[id(tensor)] for name, tensor in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record. Nothing is unpickled: NumPy refuses objects."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


def weigh(content: RecordDict) -> tuple[int, int]:
    """Bytes of the array records as serialized, framing and names included; and of all the rest."""
    arrays = rest = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            arrays += record.count_bytes()
        elif isinstance(record, ConfigRecord | MetricRecord):
            rest += record.count_bytes()
    return arrays, rest
