"""Tables with images, labels and client ids in columns, in all forms that ``hf:PATH`` reads."""

from __future__ import annotations

import dataclasses
import io
import socket

import datasets
import numpy as np
import PIL.Image
import pytest

from fedkd.core.errors import DataError, UsageError
from fedkd.data import loading, sources
from fedkd.data.readers import read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    loading.read.cache_clear()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """A local path is never looked up on the hub."""

    def connect(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)


def picture(value: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((12, 12, 3), value, np.uint8))


def png(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


def table(values, labels, more=None, **features) -> datasets.Dataset:
    """A table with the columns image and label."""
    made = datasets.Dataset.from_dict({"image": values, "label": labels, **(more or {})})
    for name, feature in features.items():
        made = made.cast_column(name, feature) if feature else made
    return made


def source(path, *options: str, **changes):
    return dataclasses.replace(sources.named(",".join([f"hf:{path}", "pixels=12", *options])), **changes)


def seen(path, *options: str, split: str = "train", **changes):
    """The gray value and the label of each image."""
    images = read(source(path, *options, **changes), split)
    return images.pixels[:, 5, 5, 0].tolist(), images.labels.tolist(), images.names


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([picture(v) for v in (1, 2, 3)], datasets.Image()),
        ([png(v) for v in (1, 2, 3)], None),
        ([{"bytes": png(v), "path": None} for v in (1, 2, 3)], None),
        ([{"bytes": png(v)} for v in (1, 2, 3)], None),
        ([np.full((12, 12), v).tolist() for v in (1, 2, 3)], None),
        ([np.full((10, 12, 3), v) for v in (1, 2, 3)], datasets.Array3D((10, 12, 3), "uint8")),
        ([np.full((28, 28), v) for v in (1, 2, 3)], datasets.Array2D((28, 28), "uint8")),
    ],
    ids=["image", "bytes", "struct", "struct of bytes", "lists", "array of three dimensions", "array"],
)
def test_images_of_every_form(values, feature, tmp_path):
    table(values, [1, 0, 1], image=feature).to_parquet(str(tmp_path / "t.parquet"))
    assert seen(tmp_path / "t.parquet") == ([1, 2, 3], [1, 0, 1], ())


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["cat", "ant", "cat"], [1, 0, 1], ("ant", "cat")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([2.0, 0.0, 2.0], [2, 0, 2], ()),
        ([2, 0, 2], [2, 0, 2], ()),
    ],
)
def test_labels_of_every_type(labels, numbers, names, tmp_path):
    table([png(v) for v in (1, 2, 3)], labels).to_parquet(str(tmp_path / "t.parquet"))
    assert seen(tmp_path / "t.parquet") == ([1, 2, 3], numbers, names)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (["a", None, "b"], "Image 1 of .* has no label; .*--skip-damaged"),
        ([0, None, 1], "Image 1 of .* has no label"),
        ([0.0, float("nan"), 1.0], "Image 1 of .* has no label"),
        ([0.0, 0.5, 1.0], "Image 1 of .* has the label 0.5, which is no class number"),
        ([0, -1, 1], "labels that are not classes; hidden labels are often -1"),
        ([[0], [1], [2]], "Column label of .* holds .*, not one class for each image"),
    ],
)
def test_labels_that_are_none(labels, error, tmp_path):
    table([png(v) for v in (1, 2, 3)], labels).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=error):
        seen(tmp_path / "t.parquet")
    values, numbers, _ = seen(tmp_path / "t.parquet", labeled=False)
    assert (values, numbers) == ([1, 2, 3], [-1, -1, -1]), "a proxy set does not need them"
    if "no label" in error:
        assert seen(tmp_path / "t.parquet", skip_damaged=True)[:2] == ([1, 3], [0, 1])


def test_rows_that_are_left_out_are_counted(tmp_path, capsys):
    table([png(v) for v in (1, 2, 3, 4)], ["a", None, "b", None]).to_parquet(str(tmp_path / "counted.parquet"))
    seen(tmp_path / "counted.parquet", skip_damaged=True)
    assert "2 images left out, the first since Image 1 of" in capsys.readouterr().err


def test_numbers_that_no_image_has_are_noted(tmp_path, capsys):
    made = table([png(v) for v in (1, 2, 3)], [1, 2, 2])
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "from_one"))
    assert loading.splits(source(tmp_path / "from_one"), "")[0].classes == 3
    assert "only 2 of the classes 0 to 2 have training images" in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "reason"), [(None, "has no image"), (b"no image", "is damaged")])
def test_an_image_that_cannot_be_used_is_named(bad, reason, tmp_path):
    table([png(1), bad, png(3)], [0, 1, 0], image=datasets.Image()).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=rf"^Image 1 of hf:{tmp_path}/t.parquet \(train\) {reason}"):
        seen(tmp_path / "t.parquet")
    assert seen(tmp_path / "t.parquet", skip_damaged=True)[:2] == ([1, 3], [0, 0])


@pytest.mark.parametrize("values", [[[[0.5] * 9] * 9], [[[300] * 9] * 9], [[[1, 2], [3]]]])
def test_arrays_that_are_no_pixels(values, tmp_path):
    table(values, [0]).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=r"^Image 0 of .*(not whole numbers from 0 to 255|different lengths)"):
        seen(tmp_path / "t.parquet")


def test_columns_are_chosen_and_never_guessed(tmp_path):
    more = {"second": [png(v) for v in (7, 8)], "kind": ["x", "y"], "fine_label": [1, 0], "coarse_label": [0, 1]}
    kinds = {name: datasets.ClassLabel(names=[f"{name}0", f"{name}1"]) for name in ("fine_label", "coarse_label")}
    made = table([png(1), png(2)], [0, 1], more, **kinds)
    made.to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=r"several image columns \(image, second\) .*choose one with image=COLUMN"):
        seen(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"several label columns \(label, fine_label\) .*label=COLUMN"):
        seen(tmp_path / "t.parquet", "image=second")
    assert seen(tmp_path / "t.parquet", "image=second", "label=kind") == ([7, 8], [0, 1], ("x", "y"))
    with pytest.raises(DataError, match=r"Unknown column of .*'knd'. Did you mean 'kind'. Known: coarse_label,"):
        seen(tmp_path / "t.parquet", "image=second", "label=knd")
    with pytest.raises(DataError, match=r"Column kind of .* holds no images"):
        seen(tmp_path / "t.parquet", "image=kind", "label=kind")
    made.remove_columns(["label", "second"]).to_parquet(str(tmp_path / "cifar100.parquet"))
    assert seen(tmp_path / "cifar100.parquet")[1:] == ([1, 0], ("fine_label0", "fine_label1")), "as in CIFAR-100"
    assert seen(tmp_path / "cifar100.parquet", "label=coarse_label")[1] == [0, 1]
    made.select_columns(["kind"]).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match=r"has no image column among kind; choose one with image=COLUMN"):
        seen(tmp_path / "none.parquet")


def test_the_numbers_of_classes_are_those_of_the_training_set(tmp_path):
    parts = {"train": table([png(v) for v in (1, 2, 3)], ["c", "a", "b"]), "val": table([png(4)], ["b"])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    train, test = loading.splits(source(tmp_path / "saved"), "")
    assert (train.labels.tolist(), test.labels.tolist(), test.names) == ([2, 0, 1], [1], ("a", "b", "c"))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_the_test_split_is_found_by_its_usual_names(name, tmp_path):
    made = {part: table([png(value)], [0]) for part, value in (("train", 1), (name, 2), ("extra", 3))}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    assert seen(tmp_path / "saved", split="test")[0] == [2]
    assert seen(tmp_path / "saved", "test=extra", split="test")[0] == [3]
    assert seen(tmp_path / "saved", "train=extra", split="train")[0] == [3]
    with pytest.raises(DataError, match=r"Unknown split of .*'extr'. Did you mean 'extra'. .* with test=SPLIT"):
        seen(tmp_path / "saved", "test=extr", split="test")


def test_without_a_test_split_a_part_is_held_out(tmp_path):
    table([png(v) for v in range(20)], [v % 2 for v in range(20)]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no test split \(it has train\).* test=0.2"):
        seen(tmp_path / "saved", split="test")
    train, test = (seen(tmp_path / "saved", "test=0.2", split=split) for split in ("train", "test"))
    assert sorted(train[0] + test[0]) == list(range(20))
    assert sorted(test[1]) == [0, 0, 1, 1], "the same fraction of each class"
    with pytest.raises(UsageError, match=r"neither a name nor a fraction"):
        source(tmp_path / "saved", "test=1.5")


def test_parquet_files_in_sub_folders(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        (tmp_path / "set" / "plain" / "deep").mkdir(parents=True, exist_ok=True)
        table([png(value)], [0]).to_parquet(
            str(tmp_path / "set" / "plain" / "deep" / f"{split}-00000-of-00001.parquet")
        )
    assert [seen(tmp_path / "set", split=split)[0] for split in ("train", "test")] == [[1], [2]]


def test_a_table_of_paths(tmp_path):
    for value in (1, 2):
        picture(value).save(tmp_path / f"{value}.png")
    (tmp_path / "t.csv").write_text("file,kind\n1.png,b\n2.png,a\n")
    with pytest.raises(DataError, match=r"no image column among file, kind"):
        seen(tmp_path / "t.csv")
    assert seen(tmp_path / "t.csv", "image=file", "label=kind") == ([1, 2], [1, 0], ("a", "b"))
    picture(9).save(tmp_path / "1.png")
    assert seen(tmp_path / "t.csv", "image=file", "label=kind")[0] == [9, 2], "the images are a part of the key"
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"^{tmp_path}/1.png is damaged"):
        seen(tmp_path / "t.csv", "image=file", "label=kind")


def test_errors_of_the_library_are_one_sentence(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "t.txt").write_text("")
    for name, error in (
        ("empty", "Cannot read hf:.*/empty: "),
        ("bad.parquet", "Cannot read hf:.*/bad.parquet: .*Parquet"),
        ("absent", "There is no folder or file .*/absent"),
        ("t.txt", "t.txt is no table; known are .csv"),
    ):
        with pytest.raises(DataError, match=error) as raised:
            seen(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_the_name_of_a_table_that_is_not_there_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"There is no folder or file letters\.parquet"):
        seen("letters.parquet")


def test_a_proxy_set_needs_no_labels(tmp_path):
    datasets.Dataset.from_dict({"picture": [png(v) for v in (1, 2)]}).to_parquet(str(tmp_path / "t.parquet"))
    values, labels, _ = seen(tmp_path / "t.parquet", labeled=False)
    assert (values, labels) == ([1, 2], [-1, -1])


def test_labels_of_a_proxy_set_are_not_kept():
    assert set(read(dataclasses.replace(sources.digits(), labeled=False), "train").labels.tolist()) == {-1}


def test_clients_are_the_values_of_a_column(tmp_path):
    ids = {"writer": [10, 9, 10, 2], "site": ["b", "a", "b", None]}
    table([png(v) for v in (1, 2, 3, 4)], [0, 1, 0, 1], ids).to_parquet(str(tmp_path / "t.parquet"))
    images = read(source(tmp_path / "t.parquet", client_column="writer"), "train")
    assert images.client_names == ("2", "9", "10"), "numbers in their own order"
    assert images.clients.tolist() == [2, 1, 2, 0]
    again = read(source(tmp_path / "t.parquet", client_column="writer"), "train")
    assert (again.client_names, again.clients.tolist()) == (images.client_names, images.clients.tolist())
    assert read(source(tmp_path / "t.parquet"), "train").clients is None
    with pytest.raises(DataError, match=r"Image 3 of .* has no client id in column site"):
        read(source(tmp_path / "t.parquet", client_column="site"), "train")
    rest = read(source(tmp_path / "t.parquet", client_column="site", skip_damaged=True), "train")
    assert (rest.client_names, rest.clients.tolist()) == (("a", "b"), [1, 0, 1])
    with pytest.raises(DataError, match=r"Unknown column of .*'wrter'. Did you mean 'writer'"):
        read(source(tmp_path / "t.parquet", client_column="wrter"), "train")


def test_rows_without_a_client_are_in_neither_part(tmp_path):
    ids = {"writer": [None if v % 7 == 0 else v % 3 for v in range(60)]}
    table([png(v) for v in range(60)], [v % 2 for v in range(60)], ids).to_parquet(str(tmp_path / "t.parquet"))
    options = {"client_column": "writer", "skip_damaged": True}
    train, test = (seen(tmp_path / "t.parquet", "test=0.2", split=s, **options)[0] for s in ("train", "test"))
    assert sorted(train + test) == [v for v in range(60) if v % 7]


def test_images_that_the_library_does_not_read_are_reported(tmp_path, capsys):
    """It follows no links to folders."""
    for name in ("train/cat", "train/eel", "elsewhere/dog"):
        (tmp_path / name).mkdir(parents=True)
        PIL.Image.new("RGB", (9, 9), (7, 7, 7)).save(tmp_path / name / "1.png")
        PIL.Image.new("RGB", (9, 9), (8, 8, 8)).save(tmp_path / name / "2.png")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    read(sources.hf(str(tmp_path / "train")), "train")
    said = capsys.readouterr().err
    assert f"reads 4 rows, but there are 6 image files; folder:{tmp_path}/train reads them all" in said


def test_paths_outside_the_folder_that_is_read_are_refused(tmp_path):
    """Their changes would not be noticed."""
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    entry = {"bytes": None, "path": str(tmp_path / "1.png")}
    table = datasets.Dataset.from_dict({"image": [entry] * 2, "label": [0, 1]}, features=features)
    table.to_parquet(str(tmp_path / "table.parquet"))
    assert table.with_format("arrow")[0]["image"][0].as_py()["bytes"] is None
    with pytest.raises(DataError, match=r"Image 0 of .* is only a path \(.*1.png\); store the image itself"):
        read(sources.hf(str(tmp_path / "table.parquet")), "train")


def test_missing_paths_are_skipped_and_a_class_may_be_called_none(tmp_path):
    PIL.Image.new("RGB", (9, 9), (7, 7, 7)).save(tmp_path / "1.png")
    (tmp_path / "table.csv").write_text("scan,letter\n1.png,None\n,NA\ngone.png,NA\n1.png,NA\n")
    source = sources.hf(str(tmp_path / "table.csv"), image="scan", label="letter")
    with pytest.raises(DataError, match="has no path"):
        read(source, "train")
    images = read(dataclasses.replace(source, skip_damaged=True), "train")
    assert images.names == ("NA", "None")
    assert images.labels.tolist() == [1, 0]
