"""Readers: images as one uint8 tensor, decoded once, cached on disk and memory-mapped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from fedkd.core import cache, notes, seeds, tensors
from fedkd.core.brief import brief
from fedkd.core.errors import DataError, FedkdError
from fedkd.data import folders, tables, user_defined
from fedkd.data.places import parquet_files
from fedkd.data.samples import Samples, decode
from fedkd.data.scaling import Scaling
from fedkd.data.sources import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYOUT = 4  # version of the cached files; increase it when their content changes
KEY_BYTES = 12  # of the hash of an image


@dataclass(frozen=True)
class Images:
    """Pixels [N, H, W, 3] uint8, labels [N] int64, and the number of classes.

    ``names`` are the names of the classes, if the data has any; ``scaling`` is that of the whole split. ``clients``
    [N] are the numbers, among ``client_names``, of the clients that the samples belong to, if the data says so.
    """

    __repr__ = brief

    pixels: Tensor
    labels: Tensor
    classes: int
    names: tuple[str, ...] = ()
    scaling: Scaling | None = None
    clients: Tensor | None = None
    client_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first ``count`` images."""
        return self.select(slice(count))

    def select(self, rows: Tensor | slice) -> Images:
        """Some of the images, without the scaling of the whole split."""

        def some(tensor: Tensor) -> Tensor:
            if isinstance(rows, slice):
                return tensor[rows]
            return tensor.index_select(0, rows.to(tensor.device))  # ten times as fast as tensor[rows]

        clients = None if self.clients is None else some(self.clients)
        return dataclasses.replace(
            self, pixels=some(self.pixels), labels=some(self.labels), scaling=None, clients=clients
        )

    def on(self, device: str, classes: int) -> Images:
        """The same images on a device, as images of so many classes; their hashes are not computed again."""
        moved = dataclasses.replace(self, classes=classes, pixels=self.pixels.to(device))
        moved.__dict__["keys"] = self.keys
        return moved

    @cached_property
    def keys(self) -> NDArray[np.void]:
        """A hash [N] of the pixels of each image."""
        return keys_of(self.pixels)


def stratified(labels: Tensor, count: int) -> Tensor:
    """The sorted indices of ``count`` samples (at most all), each class in proportion to within one.

    It is always the same draw, whatever the seed of a run is.
    """
    size, count = len(labels), min(count, len(labels))
    order = torch.from_numpy(seeds.rng(0, "stratified").permutation(size))
    by_class = order[labels[order].argsort(stable=True)]
    return by_class[torch.arange(count) * size // max(count, 1)].sort().values


def keys_of(pixels: Tensor) -> NDArray[np.void]:
    """A hash [N] of each of the images [N, H, W, 3]."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=KEY_BYTES).digest() for image in pixels.cpu().numpy())
    return np.frombuffer(b"".join(digests), f"V{KEY_BYTES}")


def read(source: Source, split: str, data_dir: str = "") -> Images:
    """One split of a data set. It is decoded once; later runs map the cached tensors, unless it is user-defined.

    Raises:
        DataError: the data is missing, cannot be downloaded, or is damaged.

    """
    try:
        files, load, said = _found(source, split, data_dir)
        if source.reader == "user_defined":  # nobody knows whether it has changed
            images, said = _decoded(source, split, load)
            for note in said:
                notes.say(note)
            return images
        described = json.dumps([LAYOUT, source.__dict__, split, [_stamp(file) for file in files]], sort_keys=True)
    except OSError as error:
        raise DataError(f"Cannot read {source.name} ({split}): {error}.") from error
    name = f"{source.reader}-{split}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    kept = cache.get(f"decoded/{name}", lambda: _to_tensors(*_decoded(source, split, load)))
    for note in (*said, *json.loads(kept["notes"].numpy().tobytes())):
        notes.say(note)
    return _from_tensors(kept)


def _found(
    source: Source, split: str, data_dir: str
) -> tuple[Sequence[Path], Callable[[], Samples | Images], tuple[str, ...]]:
    """The files that a split is read from, as far as they are known; what reads them; and notes for the user."""
    root = Path(source.argument).expanduser()
    files = parquet_files(source, split, data_dir)
    if source.reader == "own":
        files = [root] if root.suffix == ".parquet" else sorted(root.glob("*.parquet"))
    if files:
        return files, lambda: tables.of_parquet(source, files, split), ()
    if source.reader in ("folder", "own"):
        samples = _folder(source, root, split)
        annotations = filter(Path.is_file, [root / folders.ANNOTATIONS])
        return [*samples.files, *annotations], lambda: dataclasses.replace(samples, notes=()), samples.notes
    if source.reader == "hugging_face" and root.suffix.lower() in tables.TEXT and root.is_file():
        samples = tables.of_source(source, split)  # now, since its images are other files
        return [root, *samples.files], lambda: samples, ()
    if source.reader == "hugging_face" and root.exists():
        files = list(folders.walk(root)) if root.is_dir() else [root]
    return files, lambda: READERS[source.reader](source, split, data_dir), ()


def _folder(source: Source, root: Path, split: str) -> Samples:
    if not source.labeled:
        return folders.unlabeled(root)
    return folders.class_folders(root) if source.reader == "own" else folders.labeled(root, split, source.held_out)


def _stamp(file: Path) -> list[object]:
    """What changes when the content of a file changes, or the file that a link names."""
    try:
        state = file.stat()
    except OSError:  # reading it says what is wrong
        return [str(file)]
    return [str(file), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns]


def _decoded(source: Source, split: str, load: Callable[[], Samples | Images]) -> tuple[Images, tuple[str, ...]]:
    try:
        found = load()
        images, said = _images(found, source) if isinstance(found, Samples) else (found, ())
    except FedkdError:
        raise
    except Exception as error:  # anything that a reader raises for damaged files
        raise DataError(f"Cannot read {source.name} ({split}): {type(error).__name__}: {error}.") from error
    if not source.labeled:
        images = dataclasses.replace(images, labels=torch.full_like(images.labels, -1))
    elif not 0 <= int(images.labels.min()) <= int(images.labels.max()) < images.classes:
        raise DataError(f"{source.name} ({split}) has labels that are not classes; hidden labels are often -1.")
    has_column = images.clients is not None and (source.reader != "folder" or source.client_column == "client")
    if split == "train" and source.client_column and not has_column:
        raise DataError(
            f"{source.name} has no column {source.client_column!r}: only tables have columns of any name, "
            "and folders with clients/ID/train/CLASS/FILE the column client."
        )
    if count := getattr(source, split):
        images = images.first(count)
    return dataclasses.replace(images, scaling=Scaling.of(images.pixels)), said


def _images(samples: Samples, source: Source) -> tuple[Images, tuple[str, ...]]:
    """The samples, decoded, and notes for the user. Clients are in the order of their names, numbers in their own."""
    pixels, used, said = decode(samples, source)
    said = (*samples.notes, *said)
    samples = samples.select(used)
    labels = torch.from_numpy(samples.labels)
    images = Images(torch.from_numpy(pixels), labels, len(samples.names) or int(labels.max()) + 1, samples.names)
    if samples.clients is None:
        return images, said
    names = sorted(set(samples.clients.tolist()))
    with suppress(ValueError):
        names.sort(key=int)
    numbers = {name: number for number, name in enumerate(names)}
    clients = torch.tensor([numbers[name] for name in samples.clients.tolist()])
    return dataclasses.replace(images, clients=clients, client_names=tuple(names)), said


def _to_tensors(images: Images, said: tuple[str, ...]) -> dict[str, Tensor]:
    """Images as they are cached, with notes for the user."""
    assert images.scaling is not None
    return {
        "pixels": images.pixels,
        "labels": images.labels,
        "classes": torch.tensor(images.classes),
        "names": _text(images.names),
        "scaling": torch.tensor([images.scaling.mean, images.scaling.std], dtype=torch.float64),
        "keys": torch.from_numpy(images.keys.view(np.uint8).copy()),
        "clients": torch.zeros(0, dtype=torch.int64) if images.clients is None else images.clients,
        "client_names": _text(images.client_names),
        "notes": _text(said),
    }


def _text(texts: tuple[str, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), np.uint8).copy())


def _from_tensors(kept: tensors.Tensors) -> Images:
    names, client_names = (tuple(json.loads(kept[key].numpy().tobytes())) for key in ("names", "client_names"))
    mean, std = kept["scaling"].tolist()
    images = Images(
        kept["pixels"],
        kept["labels"],
        int(kept["classes"]),
        names,
        Scaling((*mean,), (*std,)),
        kept["clients"] if client_names else None,
        client_names,
    )
    images.__dict__["keys"] = kept["keys"].numpy().view(f"V{KEY_BYTES}")  # so that they are not computed again
    return images


def _torchvision(source: Source, split: str, data_dir: str) -> Samples:
    """A class of torchvision.datasets; its archives are checked by MD5 before they are opened."""
    from fedkd.data import downloads

    return _of_torchvision(downloads.dataset(source, split, data_dir), source)


def _of_torchvision(dataset: Any, source: Source) -> Samples:
    labels = getattr(dataset, "targets", None)
    labels = np.asarray(dataset.labels if labels is None else labels)
    pictures, names = [dataset[i][0] for i in range(len(dataset))], getattr(dataset, "classes", ())
    if source.argument == "EMNIST":  # its images are stored column by column, and its letters counted from 1
        pictures = [picture.transpose(PIL.Image.Transpose.TRANSPOSE) for picture in pictures]
        if source.train_part == "letters":
            labels, names = labels - 1, names[1:]
    return Samples.of(source.name, pictures, labels, names)


def renumbered(images: Images, names: Sequence[str], classes: int, where: str) -> Images:
    """The same images with the common numbering of classes.

    A node without images of some class would otherwise number the following classes wrongly.

    Raises:
        DataError: an unknown class.

    """
    if images.names and images.names != tuple(names):
        known = names or [str(number) for number in range(classes)]
        present = {images.names[label] for label in set(images.labels.tolist())}
        if strangers := sorted(present - set(known)):
            raise DataError(f"{where} has classes {', '.join(strangers)}, which are none of {', '.join(known)}.")
        places = torch.tensor([known.index(name) if name in known else -1 for name in images.names])
        images = dataclasses.replace(images, labels=places[images.labels])
    if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < classes:
        raise DataError(f"{where} has labels beyond the {classes} classes of this run.")
    return dataclasses.replace(images, classes=classes, names=tuple(names))


def _digits(source: Source, split: str, data_dir: str) -> Samples:
    """Every fifth sample is a test sample: the data set is not sorted, so writers stay mixed."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    rows = (np.arange(len(labels)) % 5 == 4) == (split == "test")
    gray = (data[rows].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return Samples.of(source.name, list(gray), labels[rows], [*map(str, range(10))])


def _noise(source: Source, split: str, data_dir: str) -> Images:
    count = source.count if split == "train" else min(source.count, 2000)
    generator = seeds.generator(0, "noise", split)
    pixels = torch.randint(256, (count, source.pixels, source.pixels, 3), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(10, (count,), generator=generator), 10)


READERS: dict[str, Callable[[Source, str, str], Samples | Images]] = {
    "torchvision": _torchvision,
    "hugging_face": lambda source, split, data_dir: tables.of_source(source, split),
    "digits": _digits,
    "noise": _noise,
    "user_defined": lambda source, split, data_dir: user_defined.samples(source, split),
}
