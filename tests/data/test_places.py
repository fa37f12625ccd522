"""Where data is found: one test for each layout that ``--data-dir`` may point to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchvision

from fedkd.core import cache, cli, specs
from fedkd.core.errors import DataError, UsageError
from fedkd.data import downloads, loading, places, sources
from fedkd.data.readers import read
from fedkd.simulate.__main__ import app
from tests.data.tiny_sets import AUTOMOBILES, FISH, extracted, idx, packed, parquet

KINDS = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
    "fashion-mnist": "FashionMNIST",
    "mnist": "MNIST",
    "emnist": "EMNIST",
    "emnist:part=letters": "EMNIST",
}


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(downloads, "is_reachable", lambda url: False)


def is_read(name: str, data_dir: Path) -> bool:
    """Whether both splits are the two images that the tests wrote."""
    for split in ("train", "test"):
        images = read(specs.call("dataset", name), split, str(data_dir))
        if images.pixels[:, 0, 0, 0].tolist() != [1, 2] or images.labels.tolist() != [1, 0]:
            return False
    return True


@pytest.mark.parametrize(
    ("files", "data_dir"),
    [
        ("any", "any"),
        ("any/plain_text", "any"),
        ("any/plain_text", "any/plain_text"),
        ("any/data", "any"),
        ("any/cifar10", "any"),
        ("any/cifar10/plain_text", "any"),
        ("any/cifar10/data", "any"),
        ("any/cifar10", "any/cifar10"),
        ("any/cifar-10/data", "any"),
        ("any/uoft-cs/cifar10/plain_text", "any"),
        ("any/uoft-cs/cifar10/plain_text", "any/uoft-cs"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_parquet_files_of_cifar10(files, data_dir, by_variable, tmp_path, monkeypatch):
    parquet(tmp_path / files)
    if by_variable:
        monkeypatch.setenv("FEDKD_DATA", str(tmp_path / data_dir))
    named = "" if by_variable else str(tmp_path / data_dir)
    assert loading.choose_dataset("auto", named) == ("cifar10", "")
    assert read(sources.cifar10(), "test", named).labels.tolist() == [1, 0]


@pytest.mark.parametrize("files", ["any", "any/cifar100", "any/data", "any/cifar-100/cifar100", "any/uoft-cs/cifar100"])
def test_parquet_files_of_cifar100(files, tmp_path):
    parquet(tmp_path / files, label="fine_label")
    assert is_read("cifar100", tmp_path / "any")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("svhn", "ufldl-stanford/svhn/cropped_digits"),
        ("svhn", "svhn"),
        ("stl10", "stl10/data"),
        ("fashion-mnist", "zalando-datasets/fashion_mnist/fashion_mnist"),
        ("mnist", "ylecun/mnist/mnist"),
    ],
)
def test_parquet_files_of_other_data_sets_are_found_by_the_name_of_their_folder(name, files, tmp_path):
    parquet(tmp_path / files, image="image")
    assert is_read(name, tmp_path)
    assert is_read(name, (tmp_path / files).parent if Path(files).name in places.PARQUET else tmp_path / files)
    with pytest.raises(DataError, match="is not in"):
        read(sources.cifar10(), "train", str(tmp_path))


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize(
    ("files", "other", "label", "own"),
    [
        ("cifar10", "cifar10", "fine_label", FISH),
        ("plain_text", "cifar10", "fine_label", FISH),
        ("cifar100", "cifar100", "label", AUTOMOBILES),
        ("data", "cifar100", "label", AUTOMOBILES),
    ],
)
def test_what_is_in_a_file_counts_more_than_the_name_of_its_folder(files, other, label, own, names, tmp_path):
    parquet(tmp_path / files, label=label, names=own if names else None)
    with pytest.raises(DataError, match=f"{other} is not in {tmp_path}"):
        read(specs.call("dataset", other), "train", str(tmp_path))


def test_own_images_are_never_taken_as_cifar10(tmp_path):
    parquet(tmp_path / "own" / "data", names=["cat", "dog"])
    with pytest.raises(DataError, match="holds no CIFAR-10"):
        loading.choose_dataset("auto", str(tmp_path / "own"))
    parquet(tmp_path / "mine" / "data", image="image")
    with pytest.raises(DataError, match="holds no CIFAR-10"):
        loading.choose_dataset("auto", str(tmp_path / "mine"))


def test_files_in_an_unnamed_folder_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "train-00000-of-00001.parquet"
    file.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=str(file)):
        loading.choose_dataset("auto", str(tmp_path))


@pytest.mark.parametrize("parent", ["", "set", "hyphen"])
@pytest.mark.parametrize("name", KINDS)
def test_torchvisions_files(name, parent, tmp_path, monkeypatch):
    """In the named folder, in one with the name of the data set, and the folder of the files itself."""
    folder = specs.call("dataset", name).folder
    names = places.NAMES.get(folder, (folder,))
    folder = {"": "", "set": names[0], "hyphen": names[-1]}[parent]
    files = extracted(KINDS[name], tmp_path / "any" / folder, monkeypatch)
    assert is_read(name, tmp_path / "any")
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "other"))
    monkeypatch.chdir(files)
    assert is_read(name, files)
    assert is_read(name, Path("."))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion-mnist", "mnist", "emnist"])
@pytest.mark.parametrize("at", ["folder", "archive", "parent"])
def test_an_archive_is_extracted_into_the_cache(name, at, tmp_path, monkeypatch):
    archives = packed(KINDS[name], tmp_path / "any" / name.replace("cifar", "cifar-"), monkeypatch)
    before = sorted(tmp_path.rglob("any/*"))
    data_dir = {"archive": archives[0], "folder": archives[0].parent, "parent": archives[0].parents[1]}[at]
    if name == "emnist" and at == "parent":
        assert is_read("emnist:part=letters", data_dir)
    if name.endswith("mnist") and at == "archive":
        data_dir = archives[0].parents[2]
    assert is_read(name, data_dir)
    assert sorted(tmp_path.rglob("any/*")) == before
    for archive in archives:
        archive.write_bytes(b"damaged later")
    assert is_read(name, data_dir), "decoded images are in the cache"


def test_emnist_is_upright_and_its_letters_are_26_classes(tmp_path, monkeypatch):
    """Its files have the columns of an image where MNIST's have the rows."""
    folder, image = extracted("EMNIST", tmp_path, monkeypatch), np.zeros((1, 28, 28), np.uint8)
    image[0, :9] = 200  # the first nine columns
    for split in ("train", "test"):
        idx(folder / f"emnist-letters-{split}-images-idx3-ubyte", image, [26])
        idx(folder / f"emnist-letters-{split}-labels-idx1-ubyte", image, [26])
    images = read(specs.call("dataset", "emnist:part=letters"), "test", str(tmp_path))
    assert (images.labels.tolist(), images.classes, images.names[25]) == ([25], 26, "z")
    pixels = images.pixels[0, :, :, 0]
    assert (pixels[:, :9] > 190).all()
    assert (pixels[:, 12:] < 10).all()
    assert read(specs.call("dataset", "emnist"), "test", str(tmp_path)).classes == 47
    with pytest.raises(UsageError, match="part=greek is not usable"):
        specs.call("dataset", "emnist:part=greek")


def test_an_archive_is_refused_if_its_md5_differs_or_it_is_of_another_data_set(tmp_path, monkeypatch):
    (archive,) = packed("CIFAR10", tmp_path / "any", monkeypatch)
    for data_dir in (archive, archive.parent):
        with pytest.raises(DataError, match="cifar100 is not in"):
            read(sources.cifar100(), "train", str(data_dir))
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{archive} is damaged or another file: its MD5 is not"):
        read(sources.cifar10(), "train", str(archive))
    assert not (tmp_path / "cache" / "data").exists()


def test_a_cache_into_which_an_archive_cannot_be_extracted_is_named(tmp_path, monkeypatch):
    (archive,) = packed("CIFAR10", tmp_path / "any", monkeypatch)
    (tmp_path / "cache").write_bytes(b"")  # a file
    with pytest.raises(DataError, match=f"{archive} cannot be extracted into {tmp_path}/cache/data .*FEDKD_CACHE"):
        read(sources.cifar10(), "train", str(archive))


def test_extracted_files_that_are_damaged_are_refused_unless_the_archive_is_there(tmp_path, monkeypatch):
    (archive,) = packed("CIFAR10", tmp_path, monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"incomplete")
    assert is_read("cifar10", tmp_path)
    archive.unlink()
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "other"))
    with pytest.raises(DataError, match=f"{folder} is damaged, incomplete or another version of cifar10"):
        loading.choose_dataset("auto", str(tmp_path))


@pytest.mark.parametrize("place", ["absent", "empty", "other.tar.gz"])
@pytest.mark.parametrize("by_variable", [False, True])
def test_auto_does_not_do_without_the_folder_that_is_named(place, by_variable, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tar.gz").write_bytes(b"")
    parquet(cache.directory() / "data" / "cifar10")
    assert loading.choose_dataset("auto", "") == ("cifar10", ""), "no folder is named, so that of the cache is used"
    monkeypatch.chdir(tmp_path)
    if by_variable:
        monkeypatch.setenv("FEDKD_DATA", place)
    with pytest.raises(DataError) as error:
        loading.choose_dataset("auto", "" if by_variable else place)
    fault = "does not exist" if place == "absent" else "holds no CIFAR-10"
    assert f"{tmp_path / place}, which {fault}." in str(error.value)
    for wanted in ("train-*.parquet", "plain_text", "uoft-cs/cifar10", *places.CIFAR10):
        assert wanted in str(error.value)


def test_a_run_ends_with_the_code_of_missing_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(app, ["--data-dir", str(tmp_path / "absent"), "--out", str(tmp_path / "run")])
    assert end.value.code == DataError.code == 3
    assert f"fedkd: --data-dir (or FEDKD_DATA) is {tmp_path}/absent, which does not exist" in capsys.readouterr().err


def test_auto_names_what_is_there_instead(tmp_path):
    file = parquet(tmp_path / "cifar10", label="fine_label") / "train-00000-of-00001.parquet"
    with pytest.raises(DataError, match=f"{file} has other columns or classes"):
        loading.choose_dataset("auto", str(tmp_path))


def test_the_names_of_torchvisions_files_are_those_of_its_class():
    assert (torchvision.datasets.CIFAR10.base_folder, torchvision.datasets.CIFAR10.filename) == places.CIFAR10
