from __future__ import annotations

import dataclasses
import os

import numpy as np
import PIL.Image
import pytest
import torch

from fedkd.core import specs
from fedkd.core.errors import DataError, UsageError
from fedkd.data import downloads, loading, places, proxies, readers, sources
from fedkd.data.readers import Images, read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(downloads, "is_reachable", lambda url: False)


def picture(value: int):
    return PIL.Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8))


def test_digits_are_scikit_learns_scaled():
    from sklearn.datasets import load_digits

    train, test = (read(sources.digits(), split) for split in ("train", "test"))
    assert (len(train), len(test), train.classes) == (1438, 359, 10)
    assert train.pixels.shape[1:] == (32, 32, 3)
    assert train.pixels.dtype == torch.uint8
    labels = load_digits().target
    assert np.array_equal(test.labels.numpy(), labels[4::5])
    assert train.pixels.max() == 255


def test_a_folder_of_class_folders(tmp_path):
    for split in ("train", "test"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for copy in range(3):
                picture(100 * index + copy).save(tmp_path / split / name / f"{copy}.png")
    source = specs.call("dataset", f"folder:{tmp_path},pixels=16")
    images = read(source, "train")
    assert images.pixels.shape == (6, 16, 16, 3)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    picture(7).save(tmp_path / "train" / "cat" / "new.png")
    assert len(read(source, "train")) == 7, "a changed folder is read again"


def pictured(root, split, *names):
    for index, name in enumerate(names):
        (root / split / name).mkdir(parents=True)
        picture(50 * index).save(root / split / name / "a.png")


def test_a_folder_is_read_again_whatever_changed_and_however_it_is_named(tmp_path, monkeypatch):
    pictured(tmp_path / "set", "train", "cat", "dog")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = specs.call("dataset", "folder:~/set,pixels=16")
    assert read(source, "train").pixels[:, 0, 0, 0].tolist() == [0, 50]
    cat, dog = (tmp_path / "set" / "train" / name / "a.png" for name in ("cat", "dog"))
    stamp = cat.stat()
    picture(222).save(cat)
    os.utime(cat, ns=(stamp.st_atime_ns, stamp.st_mtime_ns - 10**9))  # an older file was copied over it
    assert dog.stat().st_mtime_ns > cat.stat().st_mtime_ns
    assert read(source, "train").pixels[:, 0, 0, 0].tolist() == [222, 50]


def test_a_test_set_without_some_class_is_numbered_as_the_training_set(tmp_path):
    pictured(tmp_path / "set", "train", "cat", "dog", "fox")
    pictured(tmp_path / "set", "test", "dog", "fox")
    train, test = loading.splits(specs.call("dataset", f"folder:{tmp_path / 'set'},pixels=16"), "")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [1, 2])
    assert test.names == train.names == ("cat", "dog", "fox")
    pictured(tmp_path / "other", "train", "cat", "dog")
    pictured(tmp_path / "other", "test", "cat", "yak")
    with pytest.raises(DataError, match="yak, which are none of cat, dog"):
        loading.splits(specs.call("dataset", f"folder:{tmp_path / 'other'},pixels=16"), "")


def test_labels_that_are_hidden_are_refused(monkeypatch):
    held = Images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([-1, -1]), 10)
    monkeypatch.setitem(readers.READERS, "digits", lambda *_: held)
    with pytest.raises(DataError, match="labels that are not classes"):
        read(sources.digits(), "test")


def test_a_split_of_which_files_are_missing_is_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train-00000-of-00005.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="holds 1 of 5 parquet files of train"):
        read(sources.cifar10(), "train", str(tmp_path))


def test_a_link_that_leads_nowhere_is_a_data_error(tmp_path):
    pictured(tmp_path / "set", "train", "cat")
    (tmp_path / "set" / "train" / "cat" / "b.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=rf"^{tmp_path}/set/train/cat/b.png cannot be opened .*--skip-damaged"):
        read(specs.call("dataset", f"folder:{tmp_path / 'set'},pixels=16"), "train")


@pytest.mark.parametrize("kind", ["folder", "own"])
@pytest.mark.parametrize(
    ("place", "to"), [("cat/back", ".."), ("cat/back", "../.."), ("back", "."), ("back", ".."), ("puma", "cat")]
)
def test_a_link_to_another_folder_of_the_set_is_refused_by_its_name(place, to, kind, tmp_path):
    """It would repeat images, under labels that are not theirs."""
    pictured(tmp_path, "train", "cat", "dog")
    (tmp_path / "train" / place).symlink_to(to)
    source = sources.folder(str(tmp_path)) if kind == "folder" else sources.own(str(tmp_path / "train"), 16)
    with pytest.raises(DataError, match=f"{tmp_path}/train/{place}"):
        read(source, "train")


def test_folders_in_the_folder_of_a_class_are_refused(tmp_path):
    pictured(tmp_path, "train", "animals/cat", "animals/dog", "cars")
    with pytest.raises(DataError, match=f"{tmp_path}/train/animals/cat is a folder in the folder of a class"):
        read(sources.folder(str(tmp_path)), "train")


def test_a_class_may_be_a_link_and_is_read_again_if_it_changed(tmp_path):
    pictured(tmp_path, "elsewhere", "cat")
    pictured(tmp_path, "set/train", "dog", "fox")
    (tmp_path / "set" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    source = sources.folder(str(tmp_path / "set"))
    assert read(source, "train").pixels[:, 0, 0, 0].tolist() == [0, 0, 50]
    picture(222).save(tmp_path / "elsewhere" / "cat" / "a.png")
    assert read(source, "train").pixels[:, 0, 0, 0].tolist() == [222, 0, 50]


def test_a_data_set_with_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        pictured(tmp_path, split, "cat")
    with pytest.raises(DataError, match=r"has only one class \(cat\)"):
        loading.splits(sources.folder(str(tmp_path)), "")


@pytest.mark.parametrize("kind", ["folder", "own"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_damaged_image_is_named(keep, kind, tmp_path):
    pictured(tmp_path, "train", "cat", "dog")
    damaged = tmp_path / "train" / "dog" / "a.png"
    noise = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:keep])
    source = sources.folder(str(tmp_path)) if kind == "folder" else sources.own(str(tmp_path / "train"), 16)
    with pytest.raises(DataError, match=f"^{damaged} is damaged"):
        read(source, "train")


def test_a_hugging_face_folder_and_parquet(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = datasets.Dataset.from_dict({"img": [picture(v) for v in (1, 2)], "label": [2, 0]}, features=features)
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        table.to_parquet(str(tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet"))
    for source, data_dir in (
        (specs.call("dataset", f"hf:{tmp_path}/cifar10"), ""),
        (sources.cifar10(), str(tmp_path)),
        (sources.cifar10(), str(tmp_path / "cifar10")),
    ):
        images = read(source, "test", data_dir)
        assert images.labels.tolist() == [2, 0]
        assert images.classes == 3
        assert images.pixels[:, 3, 3].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_the_second_start_maps_the_decoded_tensors(tmp_path, monkeypatch, offline):
    test_a_hugging_face_folder_and_parquet(tmp_path)
    monkeypatch.setattr(readers.tables, "of_parquet", None)
    assert len(read(sources.cifar10(), "test", str(tmp_path))) == 2


def test_missing_data_names_the_places_and_the_ways_out(offline, tmp_path):
    with pytest.raises(DataError, match=r"--data-dir .*--dataset digits"):
        read(sources.cifar10(), "train", str(tmp_path))
    with pytest.raises(DataError, match="train"):
        read(specs.call("dataset", f"folder:{tmp_path}/absent"), "train")


def test_a_damaged_archive_is_refused(offline, tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (batches / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(DataError):
        read(sources.cifar10(), "train", str(tmp_path))


def test_damaged_parquet_is_a_data_error(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="Cannot read cifar10"):
        read(sources.cifar10(), "train", str(tmp_path))


def test_auto_falls_back_and_gives_the_reason(offline):
    name, why = places.by_auto(lambda source: read(source, "train"), "")
    assert name == "digits"
    assert "cannot be reached" in why
    assert places.by_auto(lambda source: None, "") == ("cifar10", "")


def test_noise_is_the_same_every_time():
    source = specs.call("dataset", "noise:size=50")
    first, again = read(source, "train"), read(source, "train")
    assert torch.equal(first.pixels, again.pixels)
    assert first.pixels.shape == (50, 32, 32, 3)


def test_only_the_first_images_of_a_split():
    whole = specs.call("dataset", "noise:size=50")
    fewer = dataclasses.replace(whole, train=20, test=5)
    assert [len(read(fewer, split)) for split in ("train", "test")] == [20, 5]
    assert torch.equal(read(fewer, "train").labels, read(whole, "train").labels[:20])
    assert specs.call("dataset", "cifar10:train=20,test=5") == dataclasses.replace(sources.cifar10(), train=20, test=5)


def test_a_held_out_proxy_is_disjoint_and_follows_the_seed():
    proxy, private = proxies.hold_out(300, 1000, seed=0)
    assert (len(proxy), len(private)) == (300, 700)
    assert not set(proxy) & set(private)
    assert not np.array_equal(proxy, proxies.hold_out(300, 1000, seed=1)[0])
    assert len(proxies.hold_out(None, 50_000, 0)[0]) == 5000
    assert len(proxies.hold_out(None, 1438, 0)[0]) == 287


@pytest.mark.parametrize("size", [1000, 5000])
def test_a_proxy_that_leaves_nothing_is_refused(size):
    with pytest.raises(UsageError, match="use a smaller size"):
        proxies.hold_out(size, 1000, 0)


@pytest.mark.parametrize("text", ["holdout:size=0", "holdout:size=-5", "holdout:count=3", "cifar1000", "noise:size=x"])
def test_a_proxy_that_cannot_be_is_refused_by_its_text(text):
    with pytest.raises(UsageError, match="--proxy"):
        proxies.parse(text)


def test_sizes_and_options_of_proxies():
    source, size = proxies.parse("stl10:size=100,pixels=48")
    assert (source.name, source.pixels, size) == ("stl10", 48, 100)
    assert source == proxies.parse("stl10:size=7,pixels=48")[0], "decoded once, whatever the size"
    source, size = proxies.parse("noise:size=64")
    assert (source.count, size) == (64, 64)
    assert proxies.parse("hf:some/name,size=3")[0].argument == "some/name"


def test_images_that_are_private_or_test_images_never_become_proxy():
    public = read(specs.call("dataset", "noise:size=60"), "train")
    known = Images(public.pixels[:20], public.labels[:20], 10)
    drawn = proxies.draw(public, None, [known], 0, "noise")
    assert len(drawn) == 40
    assert not any((drawn == image).flatten(1).all(1).any() for image in known.pixels)
    with pytest.raises(UsageError, match="only 40 of its 60"):
        proxies.draw(public, 41, [known], 0, "noise")
    with pytest.raises(UsageError, match="use another proxy set"):
        proxies.draw(known, None, [known], 0, "noise")


@pytest.mark.real
def test_cifar10_as_stored(data_dir):
    test = read(sources.cifar10(), "test", data_dir)
    assert test.pixels.shape == (10_000, 32, 32, 3)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    # The published statistics of CIFAR-10's channels are close to (125.3, 123.0, 113.9).
    assert test.pixels.double().mean((0, 1, 2)).tolist() == pytest.approx([126.0, 123.7, 114.9], abs=1.0)
    assert dataclasses.astuple(test)[2] == 10


@pytest.mark.real
def test_the_files_of_cifar10_are_those_of_their_layout(data_dir):
    root = places.chosen(data_dir)
    files = places.parquet_files(sources.cifar10(), "train", data_dir)
    assert files == sorted((root / "cifar10").glob("train-*.parquet")) != []
    assert places.parquet_files(sources.cifar10(), "train", str(root / "cifar10")) == files
    assert places.parquet_files(sources.cifar100(), "train", str(root / "cifar10")) == []


def test_classes_are_numbered_by_their_names_where_a_node_lacks_some(tmp_path):
    """Without class 0 and 1, a folder's own numbers would be two too small."""
    for name in ("3", "2"):
        (tmp_path / name).mkdir()
        picture(int(name)).save(tmp_path / name / "image.png")
    images = read(sources.own(str(tmp_path), 16), "train")
    assert images.labels.tolist() == [0, 1]
    seen = readers.renumbered(images, ("0", "1", "2", "3"), 4, "here")
    assert seen.labels.tolist() == [2, 3]
    assert seen.classes == 4
    assert readers.renumbered(images, (), 4, "here").labels.tolist() == [2, 3], "numbers serve as names"
    with pytest.raises(DataError, match="here has classes 3, which are none of 0, 1, 2"):
        readers.renumbered(images, ("0", "1", "2"), 3, "here")
    bare = dataclasses.replace(images, names=(), labels=torch.tensor([1, 7]))
    with pytest.raises(DataError, match="labels beyond the 4 classes"):
        readers.renumbered(bare, ("0", "1", "2", "3"), 4, "here")
    with pytest.raises(DataError, match="There is no folder"):
        read(sources.own(str(tmp_path / "absent"), 16), "train")


def test_a_node_may_hold_parquet(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    table = datasets.Dataset.from_dict({"image": [picture(v) for v in (1, 2)], "label": [1, 0]}, features=features)
    table.to_parquet(str(tmp_path / "mine.parquet"))
    for path in (tmp_path, tmp_path / "mine.parquet"):
        images = readers.renumbered(read(sources.own(str(path), 16), "train"), ("a", "b"), 2, str(path))
        assert images.labels.tolist() == [0, 1]
        assert images.pixels[:, 0, 0, 0].tolist() == [1, 2]


def test_names_and_channel_statistics_are_kept_with_the_images(monkeypatch):
    first = read(sources.digits(), "train")
    monkeypatch.setattr(readers.Scaling, "of", None)
    again = read(sources.digits(), "train")
    assert again.names == first.names == tuple("0123456789")
    assert again.scaling == first.scaling
