"""Data sets in the layouts in which they are distributed."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from fedkd.core import specs
from fedkd.core.errors import DataError
from fedkd.data.readers import read
from tests.conftest import simulated

CLASSES = ("n01443537", "n01629819", "n01641577")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


def draw(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full(size, value, np.uint8)).save(path)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Two training images of each class and four for validation, in another order of the classes."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    (root / "wnids.txt").parent.mkdir()
    (root / "wnids.txt").write_text("\n".join(reversed(CLASSES)))
    for number, name in enumerate(CLASSES):
        for copy in range(2):
            draw(root / "train" / name / "images" / f"{name}_{copy}.png", 10 * number + copy)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.png\t0\t10\t63\t58\n")
    for number, label in enumerate((2, 0, 2, 1)):
        draw(root / "val" / "images" / f"val_{number}.png", 100 + number)
        lines.append(f"val_{number}.png\t{CLASSES[label]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    draw(root / "test" / "images" / "test_0.png", 250)
    return root


def values(images):
    return images.pixels[:, 0, 0, 0].tolist()


def test_tiny_imagenet(tiny_imagenet, capsys):
    source = specs.call("dataset", f"folder:{tiny_imagenet},pixels=8")
    train, test = (read(source, split) for split in ("train", "test"))
    assert (values(train), train.labels.tolist()) == ([0, 1, 10, 11, 20, 21], [0, 0, 1, 1, 2, 2])
    assert (values(test), test.labels.tolist()) == ([100, 101, 102, 103], [2, 0, 2, 1])
    assert train.names == test.names == CLASSES
    assert not capsys.readouterr().err
    part = read(specs.call("dataset", f"folder:{tiny_imagenet},pixels=8,test=0.5"), "test")
    assert (len(part), part.labels.tolist()) == (3, [0, 1, 2])
    assert max(values(part)) < 100, "of the training images"


def test_the_classes_of_tiny_imagenet_are_read_again_if_they_change(tiny_imagenet):
    source, file = specs.call("dataset", f"folder:{tiny_imagenet},pixels=8"), tiny_imagenet / "val/val_annotations.txt"
    assert read(source, "test").labels.tolist() == [2, 0, 2, 1]
    file.write_text(file.read_text().replace(CLASSES[2], CLASSES[1]))
    assert read(source, "test").labels.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(("line", "message"), [("val_9.png\tn9", "line 5: n9 is none"), ("\n", "line 5: nothing is")])
def test_a_wrong_line_of_tiny_imagenet_is_named(line, message, tiny_imagenet):
    with (tiny_imagenet / "val/val_annotations.txt").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        read(specs.call("dataset", f"folder:{tiny_imagenet},pixels=8"), "test")


def test_a_missing_image_of_tiny_imagenet_is_named(tiny_imagenet):
    (tiny_imagenet / "val/images/val_2.png").unlink()
    with pytest.raises(DataError, match=r"val_2\.png cannot be opened"):
        read(specs.call("dataset", f"folder:{tiny_imagenet},pixels=8"), "test")


def test_cinic_10(tmp_path):
    """Its test images are those of test, or of valid if that is asked for."""
    for first, split in enumerate(("train", "valid", "test")):
        for number, name in enumerate(("airplane", "automobile")):
            draw(tmp_path / split / name / f"cifar10-{split}-{number}.png", 50 * first + number)
    for text, wanted in (("", [100, 101]), (",test=valid", [50, 51])):
        source = specs.call("dataset", f"folder:{tmp_path}{text},pixels=8")
        assert (values(read(source, "train")), values(read(source, "test"))) == ([0, 1], wanted)


def test_femnist_has_a_client_for_each_writer(tmp_path):
    """The columns and the file names of flwrlabs/femnist, which has one split."""
    import datasets

    writers = [f"f{number % 4:04}_{number % 4:02}" for number in range(40)]
    pictures = [PIL.Image.fromarray(np.full((28, 28), 3 * number, np.uint8)) for number in range(40)]
    columns = {
        "image": pictures,
        "writer_id": writers,
        "hsf_id": [0] * 40,
        "character": [n // 4 % 5 for n in range(40)],
    }
    features = {"image": datasets.Image(), "writer_id": datasets.Value("string"), "hsf_id": datasets.Value("int64")}
    features |= {"character": datasets.ClassLabel(names=[*"01234"])}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (tmp_path / "femnist" / "data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "femnist" / "data" / "train-00000-of-00001.parquet"))
    options = {"dataset": f"hf:{tmp_path}/femnist,label=character,test=0.25,flip=false,pixels=8", "rounds": 1}
    options |= {"partitioner": "natural-id:column=writer_id", "clients": 4, "proxy": "noise:size=20"}
    simulated(tmp_path / "run", **options)
    partition = np.load(tmp_path / "run" / "partition.npz")
    assert partition["seed0_ids"].tolist() == sorted(set(writers))
    assert len(partition["seed0_rows"]) == 30
