"""Folders of image files: which of their files are images, and of which class and client."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedkd.core.errors import DataError
from fedkd.core.notes import plain
from fedkd.data import pictures
from fedkd.data.samples import Samples
from fedkd.data.sources import fraction_of

SYSTEM = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "lost+found"})
ANNOTATIONS = "val/val_annotations.txt"  # the classes of Tiny-ImageNet's test images
TEST = ("test", "val", "valid", "validation")  # names of the folder of test images


@dataclass
class _Ignored:
    """Counts of what is not read, for the user."""

    hidden: int = 0
    outside: int = 0  # the folders of the classes
    suffixes: Counter[str] = field(default_factory=Counter)

    def notes(self, where: object) -> tuple[str, ...]:
        """A line for each kind of file."""
        notes = []
        if self.hidden:
            notes.append(f"{where}: {plain(self.hidden, 'hidden file')} ignored.")
        if self.outside:
            notes.append(f"{where}: {plain(self.outside, 'file')} beside the folders of the classes ignored.")
        if self.suffixes:
            kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in sorted(self.suffixes.items()))
            needs_decoder = self.suffixes.keys() & pictures.HEIF_SUFFIXES
            advice = " To read HEIC and HEIF: pip install 'fedkd[heic]'." if needs_decoder else ""
            notes.append(f"{where}: {plain(self.suffixes.total(), 'file')} not read as images ({kinds}).{advice}")
        return tuple(notes)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not part of the data: made by a system, an editor or an archiver."""
    return name.startswith(".") or name in SYSTEM


def labeled(root: Path, split: str, test: str) -> Samples:
    """The images of a split: ``SPLIT/CLASS/FILE`` or ``clients/ID/SPLIT/CLASS/FILE`` in ``root``.

    ``test`` is the name of the folder of test images, or the fraction of the images that become test images.

    Raises:
        DataError: there are no such folders.

    """
    fraction = fraction_of(test)
    if (root / ANNOTATIONS).is_file():
        samples = _tiny_imagenet(root, split if fraction is None else "train")
        return samples if fraction is None else samples.part(split, fraction)
    if fraction is None:
        return _split(root, ("train",) if split == "train" else (test,) if test else TEST)
    if any(root.glob("train/*/")) or any(root.glob("clients/*/train/")):
        samples = _split(root, ("train",))
        if unused := [name for name in TEST if (root / name).is_dir()]:
            note = f"{root}: the folder {unused[0]} is ignored, since test={test} holds out training images."
            samples = dataclasses.replace(samples, notes=(*samples.notes, note))
    else:
        samples = class_folders(root)
    return samples.part(split, fraction)


def _tiny_imagenet(root: Path, split: str) -> Samples:
    """Tiny-ImageNet as it is distributed: ``train/CLASS/images/FILE``, and ``val/images/FILE`` with a list of classes.

    Raises:
        DataError: a line of the list names no class.

    """
    ignored = _Ignored()
    names = [path.name for path in _listed(root / "train", ignored) if path.is_dir()]
    if split == "train":
        found = [[*_images(root / "train" / name / "images", ignored)] for name in names]
        files = [file for part in found for file in part]
        return _samples(root, files, np.repeat(range(len(names)), [*map(len, found)]), names, ignored.notes(root))
    files, labels, numbers = [], [], {name: number for number, name in enumerate(names)}
    for line, text in enumerate((root / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        file, name, *_ = [*text.split("\t"), "", ""]
        if name not in numbers:
            raise DataError(f"{root / ANNOTATIONS}, line {line}: {name or 'nothing'} is none of the classes in train.")
        files.append(root / "val" / "images" / file)
        labels.append(numbers[name])
    return _samples(root, files, labels, names, ())


def _split(root: Path, names: tuple[str, ...]) -> Samples:
    for name in names:
        clients = sorted(path for path in root.glob(f"clients/*/{name}") if not is_hidden(path.parent.name))
        if (root / name).is_dir():
            samples = class_folders(root / name)
            note = f"{root}: the folder clients is ignored, since there is a folder {name}."
            return dataclasses.replace(samples, notes=(*samples.notes, note)) if clients else samples
        if clients:
            return _of_clients(root, clients)
    expected = f"There is no folder {root / names[0]}; it should hold one folder of images per class"
    if names != ("train",):
        raise DataError(f"{expected}. Or hold out a fifth of the training images with folder:PATH,test=0.2.")
    raise DataError(f"{expected}. For a folder of classes without train and test, use folder:PATH,test=0.2.")


def _of_clients(root: Path, splits: list[Path]) -> Samples:
    """The images of all clients, with one numbering of classes."""
    parts = [class_folders(split) for split in splits]
    names = sorted({name for part in parts for name in part.names})
    labels = [[names.index(part.names[label]) for label in part.labels] for part in parts]
    files = [file for part in parts for file in part.files]
    clients = np.repeat([split.parent.name for split in splits], [len(part) for part in parts])
    notes = tuple(note for part in parts for note in part.notes)
    entries = [path for path in sorted((root / "clients").iterdir()) if not is_hidden(path.name)]
    if unread := [path.name for path in entries if path not in {split.parent for split in splits}]:
        notes += (f"{root}/clients: without a folder {splits[0].name}, ignored: {', '.join(unread)}.",)
    return _samples(root, files, np.concatenate(labels), names, notes, clients)


def class_folders(root: Path) -> Samples:
    """The images of a folder with a folder per class.

    Raises:
        DataError: there is no class, a class has folders in it, or two classes are the same folder (by a link).

    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; it should hold a folder of images per class.")
    ignored = _Ignored()
    classes: dict[str, Path] = {}
    files: list[Path] = []
    labels: list[int] = []
    empty: list[Path] = []
    entries = _listed(root, ignored)
    folders = [entry for entry in entries if entry.is_dir()]
    ignored.outside = len(entries) - len(folders)
    for number, folder in enumerate(folders):
        if (same := classes.setdefault(os.path.realpath(folder), folder)) != folder:
            raise DataError(f"The folders {same} and {folder} are the same (by a link); each class needs its own.")
        found = list(_images(folder, ignored))
        files += found
        labels += [number] * len(found)
        empty += [] if found else [folder]
    if not folders:
        raise DataError(f"{root} has no folders of images; it should hold one per class.")
    notes = ignored.notes(root)
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        notes += (f"{empty[0]}{more} has no images; it stays a class without them. Remove it if it is not a class.",)
    return _samples(root, files, labels, [folder.name for folder in folders], notes)


def _images(folder: Path, ignored: _Ignored) -> Iterator[Path]:
    for path in _listed(folder, ignored):
        if path.is_dir():
            raise DataError(f"{path} is a folder in the folder of a class, which should hold only images.")
        if _is_image(path, ignored):
            yield path


def unlabeled(root: Path) -> Samples:
    """All images of a folder and the folders in it, or of its folder ``train`` if there is one, without labels.

    Links are followed, but each folder is read once.

    Raises:
        DataError: there is no such folder.

    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; it should hold images.")
    top = root / "train" if (root / "train").is_dir() else root
    ignored = _Ignored()
    files = [path for path in walk(top, ignored) if _is_image(path, ignored)]
    only = () if top == root else (f"{root}: of the proxy, only its folder train is read.",)
    return _samples(root, files, [-1] * len(files), (), (*ignored.notes(top), *only))


def walk(top: Path, ignored: _Ignored | None = None) -> Iterator[Path]:
    """All files below a folder that are not hidden, in a fixed order. Links are followed, each folder is read once."""
    ignored = ignored or _Ignored()
    seen: set[str] = set()
    pending = [top]
    while pending:
        folder = pending.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        entries = _listed(folder, ignored)
        yield from (path for path in entries if not path.is_dir())
        pending += [path for path in reversed(entries) if path.is_dir()]


def _listed(folder: Path, ignored: _Ignored) -> list[Path]:
    """What a folder holds, sorted by name, without hidden files and folders."""
    entries = sorted(folder.iterdir())
    visible = [path for path in entries if not is_hidden(path.name)]
    ignored.hidden += len(entries) - len(visible)
    return visible


def _is_image(path: Path, ignored: _Ignored) -> bool:
    suffix = path.suffix.lower()
    if suffix in pictures.suffixes():
        return True
    ignored.suffixes[suffix] += 1
    return False


def _samples(
    root: Path,
    files: list[Path],
    labels: list[int] | np.ndarray,
    names: list[str] | tuple[str, ...],
    notes: tuple[str, ...],
    clients: np.ndarray | None = None,
) -> Samples:
    if not files:
        raise DataError(f"{root} has no images. {' '.join(notes)}".rstrip())
    rows = np.arange(len(files), dtype=np.int64)
    numbers = np.asarray(labels, np.int64)
    return Samples(
        str(root), lambda some: [files[row] for row in some], rows, numbers, (*names,), clients, files, notes
    )
