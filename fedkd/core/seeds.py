"""Where randomness comes from: every draw is named by (seed, purpose, round, client) and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *path: str | int) -> int:
    """A seed in [0, 2**63) for the draw named by ``path``.

    By hashing, never by ``seed + client``: neighboring seeds and clients share nothing.
    """
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, *path: str | int) -> np.random.Generator:
    """A NumPy generator for the draw named by ``path``."""
    import numpy as np

    return np.random.default_rng(derive(seed, *path))


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A torch generator on the CPU, so that the same draw is made whatever the device."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *path))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block (initialization, dropout) under ``seed``, leaving torch's own stream as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
