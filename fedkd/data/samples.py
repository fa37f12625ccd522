"""Samples: pictures that are not decoded yet, with their labels; decoded all together, by one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from fedkd.core import seeds
from fedkd.core.errors import DataError
from fedkd.core.notes import plain
from fedkd.core.runtime import cores
from fedkd.data import pictures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedkd.data.sources import Source

    Rows = NDArray[np.int64]
    #: A file, an encoded image, an open image, its pixels, why it cannot be used, or nothing.
    Picture = Path | bytes | PIL.Image.Image | NDArray[np.uint8] | pictures.BadPicture | None

CHUNK = 512  # pictures that are in memory at a time, besides their pixels


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples ``rows`` of a set. ``fetch`` gets some of its pictures.

    ``labels`` [N] are -1 where there is none. ``names`` are those of the classes, ``clients`` [N] the names of the
    clients that the samples belong to, if the set says so. ``files`` are the files of all pictures, if each has its
    own. ``notes`` are for the user.
    """

    where: str
    fetch: Callable[[Rows], Sequence[Picture]]
    rows: Rows
    labels: Rows
    names: tuple[str, ...] = ()
    clients: NDArray[np.str_] | None = None
    files: Sequence[Path] = ()
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(where: str, items: Sequence[Picture], labels: Sequence[int] | Rows, names: Sequence[str] = ()) -> Samples:
        """Samples whose pictures are items of a sequence."""
        rows = np.arange(len(items), dtype=np.int64)
        return Samples(where, lambda some: [items[row] for row in some], rows, np.asarray(labels, np.int64), (*names,))

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """The name of a picture in messages."""
        return str(self.files[self.rows[index]]) if self.files else f"Image {self.rows[index]} of {self.where}"

    def select(self, indices: Rows) -> Samples:
        """Some of the samples."""
        clients = None if self.clients is None else self.clients[indices]
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices], clients=clients)

    def part(self, split: str, fraction: float) -> Samples:
        """The training or the test part: of each class the same fraction is drawn for the test, by a fixed seed.

        Raises:
            DataError: a part is empty.

        """
        chosen = np.zeros(len(self), bool)
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            order = seeds.rng(0, "test part", int(label)).permutation(members)
            chosen[order[: round(fraction * len(members))]] = True
        if chosen.all() or not chosen.any():
            raise DataError(f"test={fraction:g} of the {len(self)} images of {self.where} leaves a part empty.")
        part = self.select(np.flatnonzero(chosen == (split == "test")))
        if split == "test" or self.clients is None or not (lost := {*self.clients} - {*self.clients[~chosen]}):
            return part
        which = f"{plain(len(lost), 'client')} without training images, {min(lost)} first"
        note = f"{self.where}: test={fraction:g} leaves {which}."
        return dataclasses.replace(part, notes=(*self.notes, note))


def decode(samples: Samples, source: Source) -> tuple[NDArray[np.uint8], Rows, tuple[str, ...]]:
    """The pixels [N, side, side, 3] of the samples, the indices of those that are used, and notes for the user.

    All are used, unless damaged ones may be skipped.

    Raises:
        DataError: a picture cannot be used; it is named.

    """
    side = source.pixels
    decoded = np.empty((len(samples), side, side, 3), np.uint8)
    bad: dict[int, str] = {}
    for index, result in enumerate(_results(samples, source)):
        if isinstance(result, pictures.BadPicture):
            bad[index] = f"{samples.place(index)} {result}"
            if not source.skip_damaged:
                raise DataError(f"{bad[index]}; {_advice(result)}") from result
        else:
            decoded[index] = result
    used = np.setdiff1d(np.arange(len(samples), dtype=np.int64), list(bad))
    if not len(used):
        raise DataError(f"{samples.where} has no image that can be used.")
    note = f"{samples.where}: {plain(len(bad), 'image')} left out, the first since {next(iter(bad.values()), '')}."
    return (decoded[used], used, (note,)) if bad else (decoded, used, ())


def _advice(problem: pictures.BadPicture) -> str:
    if isinstance(problem, pictures.TooLarge):
        return "scale it down, or raise the limit with --max-pixels."
    return "repair or remove it, or leave out all such images with --skip-damaged."


def _results(samples: Samples, source: Source) -> Iterator[NDArray[np.uint8] | pictures.BadPicture]:
    """The pixels of each sample or what is wrong with it, in order. Pillow decodes in several threads at once."""

    def one(picture: Picture) -> NDArray[np.uint8] | pictures.BadPicture:
        try:
            return _pixels(picture, source)
        except pictures.BadPicture as problem:
            return problem

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(samples), CHUNK):
            yield from pool.map(one, samples.fetch(samples.rows[start : start + CHUNK]))


def _pixels(picture: Picture, source: Source) -> NDArray[np.uint8]:
    if picture is None:
        raise pictures.Damaged("has no image")
    if isinstance(picture, pictures.BadPicture):
        raise picture
    if isinstance(picture, Path | bytes):
        try:
            return pictures.decode(picture, source.pixels, source.resize, source.max_pixels)
        except OSError as error:
            raise pictures.Damaged(f"cannot be opened ({error.strerror}: {error.filename})") from error
    image = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return pictures.pixels(image, source.pixels, source.resize)


def array(values: NDArray[Any]) -> NDArray[np.uint8] | pictures.Unsupported:
    """Pixels uint8 [H, W], [H, W, 3] or [H, W, 4], or what is wrong with them."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype == np.uint8 and values.size and (values.ndim == 2 or values.shape[2:] in ((3,), (4,))):
        return values
    shape = ", ".join(map(str, values.shape))
    return pictures.Unsupported(f"is {values.dtype} [{shape}], not whole numbers from 0 to 255 in [H, W] or [H, W, 3]")
