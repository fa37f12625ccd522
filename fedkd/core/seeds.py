"""Seeds: every random number is derived from (seed, purpose, round, client) by hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *path: str | int) -> int:
    """A seed in [0, 2**63) derived from ``seed`` and ``path``.

    By hashing, not by ``seed + client``, so that neighboring seeds and clients are independent. The strings in the
    path are part of the results: renaming one changes all random numbers that are derived with it.
    """
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, *path: str | int) -> np.random.Generator:
    """A NumPy generator seeded by ``derive``."""
    import numpy as np

    return np.random.default_rng(derive(seed, *path))


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A torch generator on the CPU, so that random numbers do not depend on the device."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *path))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block (initialization, dropout) under ``seed``; torch's global generator is restored after it."""
    import torch

    # Without a GPU, torch.manual_seed notes for one how it was called, which takes a millisecond.
    manual_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with restored():
        manual_seed(seed)
        yield


def restored() -> AbstractContextManager[None]:
    """A block after which torch's own random numbers go on as if nothing had been drawn in it."""
    import torch

    # The devices are named, as PyTorch warns if it has to find out that there are several.
    context: AbstractContextManager[None] = torch.random.fork_rng(range(_gpus()))
    return context


@cache
def _gpus() -> int:
    """How many GPUs PyTorch finds. Without one, it looks for the driver at each call."""
    import torch

    return torch.cuda.device_count()
