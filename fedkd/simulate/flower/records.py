"""Tensors as array records of Flower and back, their bytes, and what a message may hold."""

from __future__ import annotations

from io import BytesIO
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.communication.channel import ENCODED
from fedkd.communication.validation import few, names_differ

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.communication.replies import Expected
    from fedkd.core.tensors import Tensors

ARRAYS, CONFIG, METRICS, MEMORY, OWNER = "arrays", "config", "metrics", "memory", "owner"
EXAMPLES = "num-examples"  # the metric of every update
#: The settings in a message to a client. `FAULT` is there only if the client is to simulate one.
SETTINGS = frozenset({"round", "run", "algorithm", "seed", "dataset", "memory", "keep"})
FAULT = "fault"
LOST = "This client has lost its memory of round"  # in the error of a client that cannot go on from there
HEAD = 256  # bytes of NumPy's header that are allowed for each array


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
    """The tensors of a record. Nothing is unpickled, and nothing is allocated before the sizes agree.

    Raises:
        ValueError: an array holds objects, or other bytes than its header says.

    """
    return {name: _tensor(array.data) for name, array in record.items()}


def _tensor(data: bytes) -> Tensor:
    file = BytesIO(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = read[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        raise ValueError("it holds objects")
    if prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError("its header does not fit its data")
    values = np.frombuffer(data, dtype, prod(shape), file.tell())
    return torch.from_numpy(values.reshape(shape, order="F" if is_fortran else "C").copy())


def undeclared_in_message(content: RecordDict) -> str:
    """What a message to a client holds that it may not hold; empty if there is nothing."""
    config = content.get(CONFIG)
    if set(content) != {ARRAYS, CONFIG} or not isinstance(config, ConfigRecord):
        return f"the records {few(content) or 'none'} instead of arrays and config"
    if more := set(config) - SETTINGS - {FAULT}:
        return f"settings that are not declared: {few(more)}"
    return ""


def undeclared_in_reply(content: RecordDict, expected: Expected) -> str:
    """What a client's reply holds that it may not hold; empty if there is nothing. No array is read."""
    arrays, numbers = content.get(ARRAYS), content.get(METRICS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(numbers, MetricRecord) or len(content) != 2:
        return f"the records {few(content) or 'none'} instead of arrays and metrics"
    names = [name.removesuffix(ENCODED) for name in arrays]
    if difference := names_differ(names, expected.sizes):
        return difference
    if len(names) != len(expected.sizes):
        return "a tensor twice"
    for name, array in arrays.items():
        most = expected.sizes[name.removesuffix(ENCODED)] + HEAD
        if len(array.data) > most:
            return f"{name} of {len(array.data):,} bytes instead of at most {most:,}"
    if more := set(numbers) - {EXAMPLES, *expected.metrics}:
        return f"metrics that are not declared: {few(more)}"
    if lists := [name for name, value in numbers.items() if not isinstance(value, int | float)]:
        return f"a list as the metric {lists[0]}"
    return ""


def count_bytes(content: RecordDict) -> tuple[int, int]:
    """Bytes of the array records as serialized, with names and headers; and of all other records."""
    arrays = rest = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            arrays += record.count_bytes()
        elif isinstance(record, ConfigRecord | MetricRecord):
            rest += record.count_bytes()
    return arrays, rest
