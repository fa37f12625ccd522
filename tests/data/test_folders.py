"""Folders of image files: what is read, what is ignored and reported, and when it is read again."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import PIL.Image
import pytest

from fedkd.core import notes, specs
from fedkd.core.errors import DataError, UsageError
from fedkd.data import loading, pictures, proxies, readers, sources
from fedkd.data.readers import read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    notes.say.cache_clear()
    loading.read.cache_clear()


def write(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)).save(path)


def classes(root, *names: str, each: int = 1, start: int = 0) -> None:
    for index, name in enumerate(names):
        for number in range(each):
            write(root / name / f"{number}.png", start + 50 * index + number)


def values(images) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


def folder(root, **options):
    return sources.folder(str(root), pixels=16, **options)


HIDDEN = [".ipynb_checkpoints/0.png", "__MACOSX/0.png", "@eaDir/0.png", ".DS_Store", "Thumbs.db", "cat/.DS_Store"]
HIDDEN += ["cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/desktop.ini", "dog/@eaDir/0.png"]


@pytest.mark.parametrize("kind", ["folder", "own", "unlabeled"])
def test_hidden_files_and_folders_are_ignored_and_counted_once(kind, tmp_path, capsys):
    classes(tmp_path / "train", "cat", "dog")
    for name in HIDDEN:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of a system")
    source = sources.own(str(tmp_path / "train"), 16) if kind == "own" else folder(tmp_path)
    source = dataclasses.replace(source, labeled=kind != "unlabeled")
    for _ in range(2):
        images = read(source, "train")
    assert values(images) == [0, 50]
    assert images.names == (() if kind == "unlabeled" else ("cat", "dog"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"fedkd: {tmp_path}/train: {len(HIDDEN)} hidden files ignored."
    assert len(said) == (2 if kind == "unlabeled" else 1), "once"


def test_other_suffixes_are_read_or_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "can_read_heif", lambda: False)
    classes(tmp_path / "train", "cat", "dog")
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "0.JPEG")
    PIL.Image.new("RGB", (9, 9), (7, 7, 7)).save(tmp_path / "train" / "cat" / "1.gif")
    for name in ("clip.mp4", "notes.txt", "README", "other.TXT"):
        (tmp_path / "train" / "dog" / name).write_text("no image")
    (tmp_path / "train" / "dog" / "photo.HEIC").write_bytes(b"needs a decoder")
    assert values(read(folder(tmp_path), "train")) == [0, 7, 50]
    said = capsys.readouterr().err
    assert f"{tmp_path}/train: 5 files not read as images" in said
    assert "(1 without a suffix, 1 .heic, 1 .mp4, 2 .txt)" in said
    assert "pip install 'fedkd[heic]'" in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_a_warning_with_advice_in_both_parts(split, tmp_path, capsys):
    for name in ("train", "test"):
        classes(tmp_path / name, "cat", "dog", start=10 * len(name))
    (tmp_path / split / "eel").mkdir()
    train, test = loading.splits(folder(tmp_path), "")
    assert f"{tmp_path}/{split}/eel has no images; it stays a class without them. Remove it" in capsys.readouterr().err
    assert (train.names, train.classes) == (test.names, test.classes)
    assert test.labels.tolist() == train.labels.tolist() == [0, 1]


def test_images_beside_the_classes_are_reported(tmp_path, capsys):
    classes(tmp_path / "train", "cat", "dog")
    write(tmp_path / "train" / "stray.png", 3)
    read(folder(tmp_path), "train")
    assert f"{tmp_path}/train: 1 file beside the folders of the classes ignored." in capsys.readouterr().err


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_link_to_a_folder_is_not_followed_into_a_loop(target, tmp_path):
    classes(tmp_path / "public", "a", "b/c", each=3)
    (tmp_path / "public" / "b" / "again").symlink_to(target)
    source, size = proxies.parse(f"folder:{tmp_path / 'public'},pixels=16")
    assert size is None
    assert len(read(source, "train")) == 6


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *((kind, place) for kind in ("folder", "unlabeled") for place in ("folder", "class", "file", "chain")),
        *(("hf", place) for place in ("folder", "file")),  # `datasets` does not follow other links
    ],
)
def test_a_linked_folder_or_file_is_read_again_if_what_it_names_changed(kind, place, tmp_path):
    """The new files have the names, sizes and times of the old ones."""
    for version, start in (("old", 0), ("new", 7)):
        classes(tmp_path / version, "cat", "dog", each=2, start=start)
    for path in (tmp_path / "old").rglob("*"):
        os.utime(path, ns=(0, 0))
        os.utime(tmp_path / "new" / path.relative_to(tmp_path / "old"), ns=(0, 0))
    train = tmp_path / "set" / "train"
    train.mkdir(parents=True)
    links = {"folder": [""], "class": ["cat", "dog"], "chain": ["cat", "dog"]}.get(
        place, ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    )
    if place == "folder":
        train.rmdir()
    (tmp_path / "between").symlink_to(tmp_path / "old")
    source = sources.hf(str(train), pixels=16) if kind == "hf" else folder(tmp_path / "set")
    source = dataclasses.replace(source, labeled=kind != "unlabeled")
    for version, start in (("old", 0), ("new", 7), ("old", 0)):
        for link in links:
            path = train / link
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(tmp_path / ("between" if place == "chain" else version) / link)
        (tmp_path / "between").unlink()
        (tmp_path / "between").symlink_to(tmp_path / version)
        assert values(read(source, "train")) == [start, start + 1, start + 50, start + 51]


def test_an_unlabeled_proxy_may_be_flat_or_nested(tmp_path):
    classes(tmp_path / "set" / "train", "cat", "dog", each=2)
    classes(tmp_path / "set" / "test", "cat", "dog", start=200)
    write(tmp_path / "flat" / "b.png", 11)
    write(tmp_path / "flat" / "a.png", 10)
    write(tmp_path / "nested" / "2026" / "day" / "b.png", 13)
    write(tmp_path / "nested" / "a.png", 12)
    write(tmp_path / "split" / "train" / "x" / "a.png", 14)
    write(tmp_path / "split" / "test" / "x" / "a.png", 15)
    for name, expected in (("flat", [10, 11]), ("nested", [12, 13]), ("split", [14])):
        source, _ = proxies.parse(f"folder:{tmp_path / name}")
        images = read(dataclasses.replace(source, pixels=16), "train")
        assert values(images) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        read(proxies.parse(f"folder:{tmp_path / 'empty'}")[0], "train")
    with pytest.raises(DataError, match="There is no folder"):
        read(proxies.parse(f"folder:{tmp_path / 'absent'}")[0], "train")


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "mine"])
def test_the_test_part_may_have_another_name(name, tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    classes(tmp_path / name, "cat", "dog", start=100)
    source = folder(tmp_path, test="mine") if name == "mine" else folder(tmp_path)
    assert values(loading.splits(source, "")[1]) == [100, 150]


@pytest.mark.parametrize("place", ["", "train"])
def test_a_fraction_of_each_class_may_be_held_out_for_the_test(place, tmp_path):
    classes(tmp_path / "set" / place, "cat", "dog", each=10)
    classes(tmp_path / "set" / place, "eel", each=5, start=200)
    source = specs.call("dataset", f"folder:{tmp_path / 'set'},pixels=16,test=0.2")
    train, test = loading.splits(source, "")
    assert sorted(values(train) + values(test)) == [*range(10), *range(50, 60), *range(200, 205)]
    assert np.bincount(test.labels).tolist() == [2, 2, 1]
    assert values(test) != [0, 1, 50, 51, 200], "drawn, not the first ones"
    again = loading.splits(dataclasses.replace(source, pixels=20), "")[1]
    assert values(again) == values(test)


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5"])
def test_a_fraction_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="neither a name nor a fraction"):
        specs.call("dataset", f"folder:here,test={value}")


def test_without_a_test_part_the_way_out_is_named(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    with pytest.raises(DataError, match=r"There is no folder .*/test; .*test=0.2"):
        loading.splits(folder(tmp_path), "")
    with pytest.raises(DataError, match=r"leaves a part empty"):
        loading.splits(folder(tmp_path, test="0.2"), "")


def test_a_folder_per_client(tmp_path):
    classes(tmp_path / "clients" / "ann" / "train", "cat", "dog", each=2)
    classes(tmp_path / "clients" / "bob" / "train", "dog", "eel", start=100)
    classes(tmp_path / "clients" / "bob" / "test", "dog", start=200)
    classes(tmp_path / "clients" / ".trash" / "train", "fox")
    train, test = loading.splits(folder(tmp_path), "")
    assert train.names == test.names == ("cat", "dog", "eel")
    assert values(train) == [0, 1, 50, 51, 100, 150]
    assert train.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert train.client_names == ("ann", "bob")
    assert train.clients.tolist() == [0, 0, 0, 0, 1, 1]
    assert (values(test), test.labels.tolist()) == ([200], [1])
    assert read(folder(tmp_path), "train").clients.tolist() == [0, 0, 0, 0, 1, 1], "from the cache"


def test_images_in_two_parts_are_reported_with_their_number(tmp_path, capsys):
    classes(tmp_path / "set" / "train", "cat", "dog", each=3)
    classes(tmp_path / "set" / "test", "cat", "dog", each=2)
    write(tmp_path / "public" / "1.png", 1)
    write(tmp_path / "public" / "2.png", 222)
    train, test = loading.splits(folder(tmp_path / "set"), "")
    assert f"folder:{tmp_path}/set: 4 of 4 test images are also training images" in capsys.readouterr().err
    public = read(dataclasses.replace(proxies.parse(f"folder:{tmp_path}/public")[0], pixels=16), "train")
    assert proxies.draw(public, None, [train, test], 0, "mine")[:, 0, 0, 0].tolist() == [222]
    assert "--proxy mine: 1 of 2 images left out: private or test images" in capsys.readouterr().err


def test_the_keys_of_images_are_those_of_their_pixels():
    images = read(sources.noise(size=5, pixels=8), "train")
    assert images.keys.tolist() == readers.keys_of(images.pixels).tolist()
    assert len(set(images.keys.tolist())) == 5
    assert images.first(2).keys.tolist() == images.keys[:2].tolist()


def test_what_is_left_out_of_folders_is_said(tmp_path, capsys):
    classes(tmp_path / "clients" / "ann" / "train", "cat", "dog", each=3)
    classes(tmp_path / "clients" / "bob", "cat")
    (tmp_path / "clients" / "readme.txt").write_text("no client")
    read(folder(tmp_path), "train")
    assert f"{tmp_path}/clients: without a folder train, ignored: bob, readme.txt." in capsys.readouterr().err
    classes(tmp_path / "test", "cat")
    read(folder(tmp_path, test="0.4"), "train")
    assert f"{tmp_path}: the folder test is ignored, since test=0.4 holds out" in capsys.readouterr().err
    classes(tmp_path / "train", "cat", "dog")
    read(folder(tmp_path), "train")
    assert f"{tmp_path}: the folder clients is ignored, since there is a folder train." in capsys.readouterr().err


def test_a_class_may_be_called_train_or_clients(tmp_path):
    classes(tmp_path, "train", "clients", each=5)
    assert read(folder(tmp_path, test="0.2"), "train").names == ("clients", "train")


def test_classes_that_lack_images_or_are_easily_confused_are_reported(tmp_path, capsys):
    classes(tmp_path / "train", "cat", "Cat ", "dog", each=2)
    classes(tmp_path / "test", "dog", start=200)
    (tmp_path / "train" / "eel").mkdir()
    classes(tmp_path / "test", "eel", start=240)
    loading.splits(folder(tmp_path), "")
    said = capsys.readouterr().err
    assert "2 of 4 classes have no test images (Cat , cat)" in said
    assert "1 of 4 classes have no training images (eel)" in said
    assert "the classes 'Cat ' and 'cat' differ only in case or spaces" in said


def test_a_file_that_is_gone_is_skipped_as_a_damaged_one(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = dataclasses.replace(folder(tmp_path), skip_damaged=True)
    assert values(read(source, "train")) == [0, 50]
