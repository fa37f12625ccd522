"""Data sets as tensors, read once per process."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from fedkd.core import notes
from fedkd.core.errors import DataError
from fedkd.data import places

if TYPE_CHECKING:
    from fedkd.data.readers import Images
    from fedkd.data.sources import Source


def choose_dataset(dataset: str, data_dir: str) -> tuple[str, str]:
    """The spec of the data set, and why it is not CIFAR-10 if ``auto`` fell back to another one.

    Raises:
        DataError: ``auto``, and the folder that is named for the data does not hold CIFAR-10.

    """
    if dataset != "auto":
        return dataset, ""
    return places.by_auto(lambda source: read(source, "train", data_dir), data_dir)


@lru_cache(maxsize=8)
def read(source: Source, split: str, data_dir: str) -> Images:
    """One split of a data set, read once per process."""
    from fedkd.data import readers

    return readers.read(source, split, data_dir)


def digest(*parts: Images) -> str:
    """A hash of images, their labels and the names of their classes."""
    sha = hashlib.sha256()
    for images in parts:
        sha.update(images.keys.tobytes() + images.labels.numpy().tobytes() + "|".join(images.names).encode())
    return sha.hexdigest()


def splits(source: Source, data_dir: str) -> tuple[Images, Images]:
    """Training and test images with the same numbering of classes: a folder may lack some classes in its test set.

    Raises:
        DataError: they cannot be read, have other classes, or only one.

    """
    import numpy as np

    from fedkd.data.readers import renumbered

    train, test = (read(source, split, data_dir) for split in ("train", "test"))
    if train.classes < 2:
        raise DataError(f"{source.name} has only one class ({', '.join(train.names) or 0}); two or more are needed.")
    if not train.names and (seen := len(np.unique(train.labels))) < train.classes:
        notes.say(f"{source.name}: only {seen} of the classes 0 to {train.classes - 1} have training images.")
    if train.names and test.names and train.names != test.names:
        test = renumbered(test, train.names, train.classes, f"The test set of {source.name}")
    if bool(train.names) != bool(test.names):
        raise DataError(f"{source.name} has names of classes in one of its parts and only numbers in the other.")
    _report_classes(source, train, test)
    if both := int(np.isin(test.keys, train.keys).sum()):
        notes.say(f"{source.name}: {both:,} of {len(test):,} test images are also training images.")
    return train, test


def _report_classes(source: Source, train: Images, test: Images) -> None:
    """Say which classes are in one part only, and which names are easily confused."""
    trained, tested = (set(images.labels.tolist()) for images in (train, test))
    for missing, part in ((tested - trained, "training"), (trained - tested, "test")):
        if missing:
            names = ", ".join(train.names[label] if train.names else str(label) for label in sorted(missing)[:10])
            notes.say(f"{source.name}: {len(missing)} of {train.classes} classes have no {part} images ({names}).")
    similar: dict[str, list[str]] = {}
    for name in train.names:
        similar.setdefault("".join(name.split()).casefold(), []).append(name)
    for group in filter(lambda each: len(each) > 1, similar.values()):
        notes.say(f"{source.name}: the classes {' and '.join(map(repr, group))} differ only in case or spaces.")
