"""Layers of K stacked clients, each with its own weights, in one kernel (Triton; on a GPU).

Results are bitwise repeatable, and a client's do not depend on the other clients. They are not operators
of ``torch.library``: the first call of one imports PyTorch's compiler, which takes more than a second.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def is_available(x: Tensor) -> bool:
    """Whether there are kernels for the device and the type of x."""
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and x.dtype in (torch.float32, torch.bfloat16) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
