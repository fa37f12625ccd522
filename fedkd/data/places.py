"""Where the files of a named data set are: parquet files as on the Hugging Face hub, or torchvision's files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.core import cache
from fedkd.core.errors import DataError
from fedkd.data.sources import cifar10

if TYPE_CHECKING:
    from fedkd.data.sources import Source

#: Names of the folder of a data set, that of its repository on the hub among them.
NAMES = {
    "cifar10": ("cifar10", "uoft-cs/cifar10", "cifar-10"),
    "cifar100": ("cifar100", "uoft-cs/cifar100", "cifar-100"),
    "svhn": ("svhn", "ufldl-stanford/svhn"),
    "stl10": ("stl10", "stl-10"),
    "mnist": ("mnist", "ylecun/mnist"),
    "fashion_mnist": ("fashion_mnist", "zalando-datasets/fashion_mnist", "fashion-mnist"),
}
#: Folders for parquet files in the folder of a data set on the hub.
PARQUET = ("", "data", "plain_text", "cropped_digits")
#: Torchvision's folder of CIFAR-10, and its archive.
CIFAR10 = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


def chosen(data_dir: str) -> Path | None:
    """The folder, or the archive, that ``--data-dir`` or ``FEDKD_DATA`` names."""
    named = data_dir or os.environ.get("FEDKD_DATA", "")
    return Path(named).expanduser().absolute() if named else None


def downloaded() -> Path:
    """The folder of downloads and of what is extracted: in the cache directory."""
    return cache.directory() / "data"


def searched(data_dir: str) -> list[Path]:
    """The places that may hold data, in order."""
    return [*filter(None, [chosen(data_dir)]), downloaded()]


def folders(source: Source, root: Path) -> list[Path]:
    """The folders that may hold a data set if ``root`` is searched: those with its name, then ``root`` itself."""
    return [*(root / name for name in _names(source)), root]


def _names(source: Source) -> tuple[str, ...]:
    return NAMES.get(source.folder, (source.folder,))


def parquet_files(source: Source, split: str, data_dir: str) -> list[Path]:
    """The parquet files of a split as on the Hugging Face hub, if there are any.

    Raises:
        DataError: some of the files are missing, or one is damaged.

    """
    if not source.folder:
        return []
    for root in searched(data_dir):
        for folder in folders(source, root):
            for place in (folder / name for name in (*PARQUET, source.folder)):
                files = sorted(place.glob(f"{split}-*.parquet"))
                if files and _is_of(source, files, place):
                    _require_all(files, split)
                    return files
    return []


def _is_of(source: Source, files: list[Path], place: Path) -> bool:
    """Whether files are of the data set, by what is in them where that is known, otherwise by names of folders."""
    from pyarrow import ArrowException, parquet

    folder = place.parent if place.name in PARQUET else place
    is_named = folder.name in {Path(name).name for name in _names(source)}
    try:
        schema = parquet.read_schema(files[0])
    except (ArrowException, OSError) as error:
        if is_named:
            return True  # reading it ends with what is wrong
        raise DataError(f"Cannot read {source.name} ({files[0]}): {error}.") from error
    features = (schema.metadata or {}).get(b"huggingface", b"")  # JSON, with the names of the classes if it has any
    columns = set(schema.names)
    if b'"aquarium_fish"' in features or "fine_label" in columns:
        return source.folder == "cifar100"
    if b'"automobile"' in features or (b'"names"' not in features and columns == {"img", "label"}):
        return source.folder == "cifar10"
    return is_named


def _require_all(files: list[Path], split: str) -> None:
    """Refuse a split with missing files: each file name states how many there are."""
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
    if counts and len(files) != max(counts):
        raise DataError(
            f"{files[0].parent} holds {len(files)} of {max(counts)} parquet files of {split}; fetch the rest."
        )


def torchvision_folders(source: Source, root: Path, extracted: str, archives: Collection[str]) -> list[Path]:
    """The folders in which torchvision may find its folder ``extracted``; ``root`` may be inside it, or an archive."""
    if root.is_file():
        return [root.parent] if root.name in archives else []
    parts = Path(extracted).parts
    depths = (depth for depth in range(len(parts)) if root.parts[-depth - 1 :] == parts[: depth + 1])
    return [*folders(source, root), *(root.parents[depth] for depth in depths)]


def by_auto(load: Callable[[Source], object], data_dir: str) -> tuple[str, str]:
    """CIFAR-10 if it is found or can be downloaded, otherwise digits: the name, and the reason for the fallback.

    Raises:
        DataError: a folder is named by ``--data-dir`` or ``FEDKD_DATA``, and CIFAR-10 is not in it or is damaged.

    """
    source, root = cifar10(), chosen(data_dir)
    if root:
        _require_cifar10(source, root)
    try:
        load(source)
    except DataError as error:
        if root:
            raise
        return "digits", str(error)
    return source.name, ""


def _require_cifar10(source: Source, root: Path) -> None:
    extracted, archive = CIFAR10
    if any(root in file.parents for file in parquet_files(source, "train", str(root))):
        return
    for folder in torchvision_folders(source, root, extracted, [archive]):
        if (folder / extracted).is_dir() or (folder / archive).is_file():
            return
    other = next(root.glob("*/train-*.parquet"), None) or next(root.glob("train-*.parquet"), None)
    what = f"which holds no CIFAR-10{f' ({other} has other columns or classes)' if other else ''}"
    raise DataError(
        f"--data-dir (or FEDKD_DATA) is {root}, {what if root.exists() else 'which does not exist'}. Looked for: "
        f"train-*.parquet with the columns img and label, {extracted}/ and {archive}, in this folder and in its "
        f"folders {', '.join(_names(source))} (parquet files also in {', '.join(PARQUET[1:3])} below these). "
        "Name another folder, or use --dataset digits, which needs no files."
    )
