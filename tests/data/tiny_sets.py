"""Data sets of a few images in the layouts of torchvision and of the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torchvision

AUTOMOBILES = ["airplane", "automobile", *"abcdefgh"]  # the first names of CIFAR-10's classes
FISH = ["apple", "aquarium_fish", *(f"class {number}" for number in range(98))]  # of CIFAR-100's


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def parquet(folder: Path, image: str = "img", label: str = "label", names: list[str] | None = None) -> Path:
    """Training and test images of gray value 1 and 2, without the names of classes unless they are given."""
    import datasets

    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    pictures = [PIL.Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)) for value in (1, 2)]
    features = datasets.Features({image: datasets.Image(), label: kind})
    table = datasets.Dataset.from_dict({image: pictures, label: [1, 0]}, features=features)
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def extracted(kind: str, root: Path, patch: pytest.MonkeyPatch) -> Path:
    """The files of a class of torchvision, two images per split; its MD5s are set to theirs. What torchvision reads."""
    made = getattr(torchvision.datasets, kind)
    if kind == "SVHN":
        return _svhn(made, root, patch)
    if kind == "STL10":
        return _stl10(made, root, patch)
    if kind in ("MNIST", "FashionMNIST"):
        return _mnist(made, root)
    if kind == "EMNIST":
        return _emnist(root)
    folder = root / made.base_folder
    folder.mkdir(parents=True)
    labels = "labels" if kind == "CIFAR10" else "fine_labels"
    lists = {"train_list": made.train_list[:1], "test_list": made.test_list}
    for listed, files in lists.items():
        for name, _ in files:
            content = {"data": np.repeat([[1], [2]], 3072, axis=1).astype(np.uint8), labels: [1, 0]}
            (folder / name).write_bytes(pickle.dumps(content))
        patch.setattr(made, listed, [[name, md5(folder / name)] for name, _ in files])
    meta = folder / made.meta["filename"]
    meta.write_bytes(pickle.dumps({made.meta["key"]: AUTOMOBILES if kind == "CIFAR10" else FISH}))
    patch.setattr(made, "meta", {**made.meta, "md5": md5(meta)})
    return folder


def _svhn(made: type, root: Path, patch: pytest.MonkeyPatch) -> Path:
    from scipy.io import savemat

    root.mkdir(parents=True)
    pixels = np.stack([np.full((32, 32, 3), value, dtype=np.uint8) for value in (1, 2)], axis=-1)
    for split, (url, name, _) in list(made.split_list.items())[:2]:
        savemat(root / name, {"X": pixels, "y": np.array([[1], [10]])})
        patch.setitem(made.split_list, split, [url, name, md5(root / name)])
    return root


def _stl10(made: type, root: Path, patch: pytest.MonkeyPatch) -> Path:
    folder = root / made.base_folder
    folder.mkdir(parents=True)
    for listed in ("train_list", "test_list"):
        for name, _ in getattr(made, listed):
            pixels = np.repeat([1, 2], 3 * 96 * 96) if "_X" in name else np.array([2, 1])
            (folder / name).write_bytes(pixels.astype(np.uint8).tobytes())
        patch.setattr(made, listed, [[name, md5(folder / name)] for name, _ in getattr(made, listed)])
    return folder


def _mnist(made: type, root: Path) -> Path:
    folder = root / made.__name__ / "raw"
    folder.mkdir(parents=True)
    for name, _ in made.resources:
        idx(folder / name.removesuffix(".gz"), np.repeat([1, 2], 784).reshape(2, 28, 28), [1, 0])
    return folder


def _emnist(root: Path) -> Path:
    """Its split balanced, and its letters, which are counted from 1."""
    folder = root / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, labels in (("balanced", [1, 0]), ("letters", [2, 1])):
        for name in (f"emnist-{part}-{split}" for split in ("train", "test")):
            idx(folder / f"{name}-images-idx3-ubyte", np.repeat([1, 2], 784).reshape(2, 28, 28), labels)
            idx(folder / f"{name}-labels-idx1-ubyte", [], labels)
    return folder


def idx(path: Path, images: np.ndarray, labels: list[int]) -> None:
    """A file of images or of labels, by its name, in MNIST's format."""
    values = np.asarray(images if "images" in path.name else labels)
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def packed(kind: str, root: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """The archives of a class of torchvision instead of the files; its MD5s are set to theirs."""
    made, folder = getattr(torchvision.datasets, kind), extracted(kind, root, patch)
    if kind == "EMNIST":
        archive = folder / "gzip.zip"
        with zipfile.ZipFile(archive, "w") as inner:
            for file in sorted(folder.glob("emnist-*")):
                inner.writestr(f"gzip/{file.name}.gz", gzip.compress(file.read_bytes()))
                file.unlink()
        patch.setattr(made, "md5", md5(archive))
        return [archive]
    if kind in ("MNIST", "FashionMNIST"):
        files = sorted(folder.iterdir())
        archives = [file.with_name(f"{file.name}.gz") for file in files]
        for file, archive in zip(files, archives, strict=True):
            archive.write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        patch.setattr(made, "resources", [(name, md5(folder / name)) for name, _ in made.resources])
        return archives
    archive = root / made.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, made.base_folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    patch.setattr(made, "tgz_md5", md5(archive))
    return [archive]
