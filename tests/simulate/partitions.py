"""A partitioner of its own module, which imports little: every worker that replaces a crashed one imports it again."""

from __future__ import annotations

import numpy as np


def sixteen(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """16 samples per client, so that training is fast."""
    return np.split(rng.permutation(len(labels))[: 16 * clients], clients)
