"""Tensors as array records of Flower and back, their bytes, and what a message may hold."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType

from fedkd.core.communication.channel import ENCODED
from fedkd.core.communication.validation import few, names_differ

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fedkd.core.communication.replies import Expected
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
    record = ArrayRecord()
    for name, tensor in tensors.items():
        if id(tensor) not in cache:
            cache[id(tensor)] = _array(tensor.contiguous().numpy())
        record[name] = cache[id(tensor)]
    return record


def _array(values: NDArray[Any]) -> Array:
    """What Flower makes of an array. It spends most of its time on the header, which is the same in each round."""
    name, head = _head(values.dtype, values.shape)
    return Array(name, values.shape, SType.NUMPY, b"".join((head, values.data)))


@lru_cache(maxsize=1024)
def _head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The name of a type, and NumPy's header of a contiguous array."""
    file = BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return str(dtype), file.getvalue()


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record. Nothing is unpickled, and nothing is allocated before the sizes agree.

    Raises:
        ValueError: an array holds objects, or other bytes than its header says.

    """
    return {name: _tensor(array.data) for name, array in record.items()}


def _tensor(data: bytes) -> Tensor:
    start = 10 if data[6:7] == b"\1" else 12  # after the length of the header, of two bytes in NumPy's version 1
    start += int.from_bytes(data[8:start], "little")
    shape, is_fortran, dtype = _read(data[:start])
    if dtype.hasobject:
        raise ValueError("it holds objects")
    if prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError("its header does not fit its data")
    values = np.frombuffer(data, dtype, prod(shape), start)
    return torch.from_numpy(values.reshape(shape, order="F" if is_fortran else "C").copy())


@lru_cache(maxsize=1024)
def _read(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, order and type in NumPy's header. Parsing takes longer than everything else."""
    file = BytesIO(head)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)](file)


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
