"""Readers: images as one uint8 tensor, decoded once, cached on disk and memory-mapped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedkd.core import cache, seeds, tensors
from fedkd.core.errors import DataError, FedkdError
from fedkd.data.scaling import Scaling
from fedkd.data.sources import Source, is_reachable, parquet_files, searched

if TYPE_CHECKING:
    from PIL.Image import Image

LAYOUT = 3  # version of the cached files; increase it when their content changes


@dataclass(frozen=True)
class Images:
    """Pixels [N, H, W, 3] uint8, labels [N] int64, and the number of classes.

    ``names`` are the names of the classes, if the data has any; ``scaling`` is that of the whole split.
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    names: tuple[str, ...] = ()
    scaling: Scaling | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first ``count`` images."""
        return Images(self.pixels[:count], self.labels[:count], self.classes, self.names)


def read(source: Source, split: str, data_dir: str = "") -> Images:
    """One split of a data set. It is decoded once; later runs map the cached tensors.

    Raises:
        DataError: the data is missing, cannot be downloaded, or is damaged.

    """
    try:
        files = parquet_files(source, split, data_dir)
        stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        described = json.dumps([LAYOUT, source.__dict__, split, stamps, _place(source)], sort_keys=True)
    except OSError as error:
        raise DataError(f"Cannot read {source.name} ({split}): {error}.") from error
    name = f"{source.reader}-{split}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    return _from_tensors(cache.get(f"decoded/{name}", lambda: _to_tensors(_decoded(source, split, data_dir, files))))


def _decoded(source: Source, split: str, data_dir: str, files: list[Path]) -> Images:
    try:
        images = _parquet(source, files) if files else READERS[source.reader](source, split, data_dir)
    except FedkdError:
        raise
    except Exception as error:  # anything that a reader raises for damaged files
        raise DataError(f"Cannot read {source.name} ({split}): {type(error).__name__}: {error}.") from error
    if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < images.classes:
        raise DataError(f"{source.name} ({split}) has labels that are not classes; hidden labels are often -1.")
    if count := getattr(source, split):
        images = images.first(count)
    return dataclasses.replace(images, scaling=Scaling.of(images.pixels))


def _place(source: Source) -> object:
    """The state of a local folder, for the key of the cache."""
    root = Path(source.argument).expanduser()
    if source.reader not in ("class_folders", "hugging_face", "own") or not root.exists():
        return None
    # `rglob` does not follow links; a class may be a link to a folder.
    files = sorted({*root.rglob("*"), *root.glob("*/*"), *root.glob("*/*/*")}) or [root]
    return [str(root.resolve()), [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]]


def _to_tensors(images: Images) -> dict[str, Tensor]:
    """Images as they are cached."""
    assert images.scaling is not None
    return {
        "pixels": images.pixels,
        "labels": images.labels,
        "classes": torch.tensor(images.classes),
        "names": torch.from_numpy(np.frombuffer(json.dumps(images.names).encode(), np.uint8).copy()),
        "scaling": torch.tensor([images.scaling.mean, images.scaling.std], dtype=torch.float64),
    }


def _from_tensors(kept: tensors.Tensors) -> Images:
    names = json.loads(kept["names"].numpy().tobytes())
    mean, std = kept["scaling"].tolist()
    return Images(kept["pixels"], kept["labels"], int(kept["classes"]), (*names,), Scaling((*mean,), (*std,)))


def pixels_of(pictures: Iterable[Image], size: int) -> Tensor:
    """Pictures as RGB [N, size, size, 3] uint8, scaled bicubically where they differ in size."""
    import PIL.Image

    rows = []
    for picture in pictures:
        rgb = picture.convert("RGB")
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), PIL.Image.Resampling.BICUBIC)
        rows.append(np.asarray(rgb))
    if not rows:
        raise DataError("A data set without images cannot be used.")
    return torch.from_numpy(np.stack(rows))


def _torchvision(source: Source, split: str, data_dir: str) -> Images:
    """A class of torchvision.datasets; its archives are checked by MD5 before they are opened."""
    import torchvision

    kind = getattr(torchvision.datasets, source.argument)
    is_split = source.argument in ("SVHN", "STL10")
    options: dict[str, Any] = {"split": split} if is_split else {"train": split == "train"}
    roots = searched(data_dir)
    for root in roots:
        try:
            return _of_torchvision(kind(str(root), download=False, **options), source)
        except (RuntimeError, FileNotFoundError, NotADirectoryError):
            continue  # missing or incomplete: torchvision raises RuntimeError for both
    help_ = (
        f"{source.name} is not in {', '.join(map(str, roots))} and {{}}. Point --data-dir (or FEDKD_DATA) to a "
        f"folder with torchvision's files or parquet files, or try --dataset digits, which needs no download."
    )
    if not is_reachable(source.host):
        raise DataError(help_.format(f"{source.host} cannot be reached within ten seconds"))
    try:
        return _of_torchvision(kind(str(roots[-1]), download=True, **options), source)
    except Exception as error:  # urllib, ssl, a full disk, a checksum: all have the same remedy
        raise DataError(help_.format(f"its download failed ({type(error).__name__}: {error})")) from error


def _of_torchvision(dataset: Any, source: Source) -> Images:
    labels = getattr(dataset, "targets", None)
    labels = torch.as_tensor(np.asarray(dataset.labels if labels is None else labels), dtype=torch.int64)
    pictures = (dataset[i][0] for i in range(len(dataset)))
    names = tuple(getattr(dataset, "classes", ()))
    return Images(pixels_of(pictures, source.pixels), labels, len(names) or int(labels.max()) + 1, names)


def _parquet(source: Source, files: list[Path]) -> Images:
    """Local parquet files in the layout of the hub."""
    import datasets

    datasets.disable_progress_bars()
    return _of_hugging_face(datasets.Dataset.from_parquet([str(f) for f in files]), source)


def _hugging_face(source: Source, split: str, data_dir: str) -> Images:
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(source.argument)
    except Exception as error:  # the library raises many kinds
        reason = str(error).splitlines()[0]
        raise DataError(f"Hugging Face cannot load {source.argument!r}: {reason}") from error
    names = [split] if split == "train" else ["test", "validation"]
    for name in names:
        if name in splits:
            return _of_hugging_face(splits[name], source)
    raise DataError(f"{source.name} has no {split} split; it has {', '.join(splits)}.")


def _of_hugging_face(table: Any, source: Source) -> Images:
    """The first image column and the label column of a Hugging Face table."""
    import datasets

    images = [n for n, f in table.features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)]
    labels += [n for n in ("label", "labels", "fine_label") if n in table.features and n not in labels]
    if not images or not labels:
        raise DataError(f"{source.name} has no image and label columns; it has {', '.join(table.features)}.")
    values = torch.tensor(table[labels[0]][:], dtype=torch.int64)
    names = tuple(getattr(table.features[labels[0]], "names", None) or ())
    pictures = (row[images[0]] for row in table.select_columns(images[:1]))
    return Images(pixels_of(pictures, source.pixels), values, len(names) or int(values.max()) + 1, names)


def _class_folders(source: Source, split: str, data_dir: str) -> Images:
    root = Path(source.argument).expanduser()
    if not (root / split).is_dir():
        raise DataError(f"There is no folder {root / split}; it should hold one folder of images per class.")
    return _image_folder(root / split, source)


def _image_folder(root: Path, source: Source) -> Images:
    """The images of a folder with a folder per class.

    Raises:
        DataError: a class has folders in it, two classes are the same folder (by a link), or an image is damaged.

    """
    from torchvision.datasets import ImageFolder

    classes: dict[Path, Path] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if nested := [path for path in folder.iterdir() if path.is_dir()]:
            raise DataError(f"{min(nested)} is a folder in the folder of a class, which should hold only images.")
        if (same := classes.setdefault(folder.resolve(), folder)) != folder:
            raise DataError(f"The folders {same} and {folder} are the same (by a link); each class needs its own.")
    return _of_torchvision(ImageFolder(str(root), loader=_picture), source)


def _picture(path: str) -> Image:
    from torchvision.datasets.folder import default_loader

    try:
        picture: Image = default_loader(path)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{path} is damaged or no image ({type(error).__name__}); repair or remove it.") from error
    return picture


def _own(source: Source, split: str, data_dir: str) -> Images:
    """The data of a node: a folder with a folder of images per class, or with parquet files."""
    root = Path(source.argument).expanduser()
    if files := [root] if root.suffix == ".parquet" else sorted(root.glob("*.parquet")):
        return _parquet(source, files)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; it should hold parquet files, or a folder of images per class.")
    return _image_folder(root, source)


def renumbered(images: Images, names: Sequence[str], classes: int, where: str) -> Images:
    """The same images with the common numbering of classes.

    A node without images of some class would otherwise number the following classes wrongly.

    Raises:
        DataError: an unknown class.

    """
    if images.names and images.names != tuple(names):
        known = names or [str(number) for number in range(classes)]
        if strangers := sorted(set(images.names) - set(known)):
            raise DataError(f"{where} has classes {', '.join(strangers)}, which are none of {', '.join(known)}.")
        places = torch.tensor([known.index(name) for name in images.names])
        images = dataclasses.replace(images, labels=places[images.labels])
    if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < classes:
        raise DataError(f"{where} has labels beyond the {classes} classes of this run.")
    return dataclasses.replace(images, classes=classes, names=tuple(names))


def _digits(source: Source, split: str, data_dir: str) -> Images:
    """Every fifth sample is a test sample: the data set is not sorted, so writers stay mixed."""
    import PIL.Image
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    rows = (np.arange(len(labels)) % 5 == 4) == (split == "test")
    gray = (data[rows].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    pictures = (PIL.Image.fromarray(image) for image in gray)
    names = tuple(map(str, range(10)))
    return Images(pixels_of(pictures, source.pixels), torch.from_numpy(labels[rows]).long(), 10, names)


def _noise(source: Source, split: str, data_dir: str) -> Images:
    count = source.count if split == "train" else min(source.count, 2000)
    generator = seeds.generator(0, "noise", split)
    pixels = torch.randint(256, (count, source.pixels, source.pixels, 3), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(10, (count,), generator=generator), 10)


READERS = {
    "torchvision": _torchvision,
    "hugging_face": _hugging_face,
    "class_folders": _class_folders,
    "own": _own,
    "digits": _digits,
    "noise": _noise,
}
