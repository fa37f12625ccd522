"""The public proxy set: unlabeled images that all clients and the server have.

Its labels are dropped here, except for algorithms that declare that they read them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedkd.core import notes, seeds, specs
from fedkd.core.brief import brief
from fedkd.core.errors import UsageError
from fedkd.core.lazy import torch
from fedkd.data import sources

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fedkd.data.readers import Images
    from fedkd.data.sources import Source

DEFAULT_SIZE = 5000


@dataclass(frozen=True, eq=False)
class ProxySet:
    """The public images [P, H, W, 3] uint8, and the samples of them that each round uses.

    ``labels`` [P] are None unless the algorithm declares that it reads them. ``per_round`` is ``--proxy-samples``
    (0: all).
    """

    __repr__ = brief

    images: Tensor
    labels: Tensor | None
    per_round: int
    seed: int
    _selected: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)  # rows and their images

    def subset(self, number: int) -> Tensor:
        """The indices of the proxy samples used in a round, sorted; all of them by default.

        They follow from the seed, so that sending the number of the round (8 bytes) names them.
        """
        if self.samples == len(self.images):
            return torch.arange(len(self.images))
        generator = seeds.generator(self.seed, "subset", number)
        chosen: Tensor = torch.randperm(len(self.images), generator=generator)[: self.per_round].sort().values
        return chosen

    def select(self, rows: Tensor) -> Tensor:
        """The images at ``rows`` [R]: the same tensor for all clients of a round, so do not write to it.

        The last two selections are kept, for those who distill on one and predict on another.
        """
        if len(rows) == len(self.images) and torch.equal(rows, torch.arange(len(rows))):
            return self.images
        for known, images in self._selected:
            if torch.equal(known, rows):
                return images
        selected = self.images[rows]
        self._selected[:] = [(rows, selected), *self._selected[:1]]
        return selected

    @property
    def samples(self) -> int:
        """The number of proxy samples in one round."""
        return self.per_round if 0 < self.per_round < len(self.images) else len(self.images)


def parse(text: str) -> tuple[Source | None, int | None]:
    """The source of the images (None: held out of the training set) and the requested number."""
    name, wanted = specs.without(text, "size")
    if wanted is not None and (not wanted.isdecimal() or int(wanted) < 1):
        raise UsageError(f"--proxy {text!r}: size is the number of images, at least 1, not {wanted!r}.")
    size = None if wanted is None else int(wanted)
    if (spec := specs.parse(name)).name == "holdout":
        if spec.options or spec.argument:
            raise UsageError(f"--proxy {text!r}: holdout has one option, size (holdout:size=5000).")
        return None, size
    try:
        source = sources.named(name)
    except UsageError as error:
        raise UsageError(f"--proxy {text!r}: {error} Or holdout, images held out of the training set.") from error
    source = dataclasses.replace(source, labeled=False)
    if source.reader == "noise":  # generated in the requested number; others are decoded once for all sizes
        source = dataclasses.replace(source, count=size or DEFAULT_SIZE)
    return source, size


def hold_out(size: int | None, rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the proxy samples in the training set and of the private samples, both sorted.

    By default a fifth of the samples is held out, at most 5,000.
    """
    count = min(DEFAULT_SIZE, rows // 5) if size is None else size
    if not 0 < count < rows:
        raise UsageError(
            f"--proxy holdout:size={count} leaves no private samples of {rows} training images; use a smaller size."
        )
    order = seeds.rng(seed, "proxy").permutation(rows)
    return np.sort(order[:count]), np.sort(order[count:])


def draw(public: Images, size: int | None, known: list[Images], seed: int, text: str) -> Tensor:
    """``size`` images [P, H, W, 3] of another data set, without those that occur in ``known``."""
    taken = np.isin(public.keys, np.concatenate([images.keys for images in known]))
    fresh = np.flatnonzero(~taken)
    count = min(DEFAULT_SIZE, len(fresh)) if size is None else size
    if not 0 < count <= len(fresh):
        raise UsageError(
            f"--proxy {text!r}: only {len(fresh)} of its {len(public)} images are neither private nor test images; "
            f"{'use another proxy set' if not len(fresh) else f'use size={len(fresh)} or less'}."
        )
    if taken.any():
        notes.say(f"--proxy {text}: {taken.sum():,} of {len(public):,} images left out: private or test images.")
    rows = np.sort(seeds.rng(seed, "proxy").permutation(fresh)[:count])
    return public.pixels[torch.from_numpy(rows)]
