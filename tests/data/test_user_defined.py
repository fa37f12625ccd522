"""Data sets of the user's own: ``./mine.py:Name`` with the parameter ``split``."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fedkd.core.errors import DataError, PluginError, UsageError
from fedkd.data import loading, sources
from fedkd.data.readers import read
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig
from fedkd.export import export
from tests.conftest import simulated

MINE = '''
import io
import numpy as np
import PIL.Image
import torch

HERE = {here!r}


def pixels(value):
    return np.full((12, 12, 3), value, np.uint8)


def png(value):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels(value)).save(file, "PNG")
    return file.getvalue()


def path(value):
    PIL.Image.fromarray(pixels(value)).save(f"{{HERE}}/{{value}}.png")
    return f"{{HERE}}/{{value}}.png"


FORMS = {{
    "open": lambda v: PIL.Image.fromarray(pixels(v)),
    "bytes": png,
    "path": path,
    "array": pixels,
    "gray": lambda v: pixels(v)[:, :, 0],
    "tensor": lambda v: torch.tensor(pixels(v)).permute(2, 0, 1),
    "floats": lambda v: torch.tensor(pixels(v)).permute(2, 0, 1) / 255,
    "number": lambda v: v,
    "channels": lambda v: pixels(v).transpose(2, 0, 1),
    "damaged": lambda v: b"no image",
    "absent": lambda v: "nowhere.png",
}}


def forms(split, *, form: str = "open", pixels: int = 12):
    return [(FORMS[form](v), name) for v, name in ((1, "dog"), (2, "cat"), (3, "dog"))]


class Squares(torch.utils.data.Dataset):
    """Squares whose brightness is their class."""

    classes = ["dark", "gray", "light"]

    def __init__(self, split, count: int = 120, pixels: int = 12, flip: bool = False):
        self.values = np.random.default_rng(split == "test").integers(0, 80, (count, 12, 12), dtype=np.uint8)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        label = index % 3
        return PIL.Image.fromarray(self.values[index] + np.uint8(80 * label)), label


def unlabeled(split):
    return [np.random.default_rng(1000 + v).integers(0, 256, (12, 12), dtype=np.uint8) for v in range(40)]


class Labels:
    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.label == "fails":
            raise KeyError("mine")
        return pixels(1), self.label


def wrong(split, *, how):
    if how == "fails":
        return {{}}["mine"]
    if how == "classes":
        made = Labels(0)
        made.classes = [1, 2]
        return made
    if how == "stranger":
        made = Labels("zebra")
        made.classes = ["dog", "cat"]
        return made
    return {{
        "generator": (v for v in ()),
        "empty": [],
        "no pair": [pixels(1)],
        "half": Labels(0.5),
        "hidden": Labels(-1),
        "item": Labels("fails"),
        "mixed": [(pixels(1), 0), (pixels(1), "dog")],
    }}[how]


def sized(split, *, pixels: int = 4):
    return []
'''


@pytest.fixture
def mine(tmp_path):
    loading.read.cache_clear()
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(here=str(tmp_path)))
    return path


@pytest.mark.parametrize("form", ["open", "bytes", "path", "array", "gray", "tensor"])
def test_images_of_every_form(form, mine):
    images = read(sources.named(f"{mine}:forms:form={form}"), "train")
    assert images.pixels[:, 5, 5].tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert (images.labels.tolist(), images.names) == ([1, 0, 1], ("cat", "dog"))


def test_size_and_mirroring_are_those_of_its_parameters(mine):
    source = sources.named(f"{mine}:Squares:count=30")
    assert (source.pixels, source.flip) == (12, False)
    source = sources.named(f"{mine}:Squares:pixels=16,flip=true")
    assert (source.pixels, source.flip) == (16, True)
    assert read(source, "test").pixels.shape == (120, 16, 16, 3)
    with pytest.raises(PluginError, match=r"pixels is a side from 8 to 1024"):
        sources.named(f"{mine}:sized")
    with pytest.raises(UsageError, match=r"Unknown option .* 'cont'. Did you mean 'count'"):
        sources.named(f"{mine}:Squares:cont=3")


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("wrong:how=fails", r"failed for split='train': KeyError: 'mine' \(mine.py, line"),
        ("wrong:how=item", r"failed at item 0 for split='train': KeyError: 'mine' \(mine.py, line"),
        ("wrong:how=generator", "gives generator, which has no length and items"),
        ("wrong:how=empty", "has no items"),
        ("wrong:how=no pair", r"item 0 is ndarray, not a pair \(image, label\)"),
        ("wrong:how=half", "item 0 has a label of type float, not an int or str"),
        ("wrong:how=hidden", "item 0 has the label -1, which is none of class numbers from 0"),
        ("wrong:how=stranger", "item 0 has the label 'zebra', which is none of the 2 classes dog, cat"),
        ("wrong:how=mixed", "item 1 has the label 'dog', which is none of class numbers"),
        ("wrong:how=classes", "attribute classes is no list of names"),
        ("forms:form=floats", r"item 0 has an image that is float32 \[12, 12, 3\].*leave out transforms"),
        ("forms:form=channels", r"item 0 has an image that is uint8 \[3, 12, 12\]"),
        ("forms:form=number", "item 0 has an image of type int"),
    ],
)
def test_what_breaks_the_contract_is_named(how, error, mine):
    with pytest.raises(PluginError, match=error) as raised:
        read(sources.named(f"{mine}:{how}"), "train")
    assert f"--dataset {mine}:{how}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_image_that_cannot_be_used_is_named(mine):
    with pytest.raises(DataError, match=r"^Image 0 of .*forms:form=damaged is damaged"):
        read(sources.named(f"{mine}:forms:form=damaged"), "train")
    with pytest.raises(DataError, match=r"nowhere.png"):
        read(sources.named(f"{mine}:forms:form=absent"), "train")


def test_it_is_not_cached_on_disk(mine, monkeypatch, tmp_path):
    """Nobody knows whether what it reads has changed."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    read(sources.named(f"{mine}:Squares"), "train")
    assert not (tmp_path / "cache").exists()


def test_a_proxy_uses_only_its_images(mine):
    for name in ("unlabeled", "wrong:how=half", "Squares"):
        source = dataclasses.replace(sources.named(f"{mine}:{name}"), labeled=False)
        assert set(read(source, "train").labels.tolist()) == {-1}


def test_methods_and_workers_train_on_it(mine, tmp_path):
    options = {"dataset": f"{mine}:Squares", "proxy": f"{mine}:unlabeled,size=30", "compare": "fedavg", "rounds": 1}
    rows = [simulated(tmp_path / workers, workers=workers, **options) for workers in ("1", "2")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    made = json.loads((tmp_path / "1" / "result.json").read_text())
    assert made["dataset"] == f"{mine}:Squares"


def test_a_student_is_distilled_and_exported_on_it(mine, tmp_path):
    dataset, out = f"{mine}:Squares", tmp_path / "run"
    small = {"student": "cnn:width=2", "teacher": "cnn:width=2", "epochs": 1, "corrupted_images": 0}
    distill(DistillConfig.parse({"dataset": dataset, "out": str(out), **small}))
    export(out, to=("pt2",), dataset=dataset)
    check = json.loads((out / "export.json").read_text())["files"]["pt2"]["check"]
    assert (check["images"], check["equal_classes"]) == (120, 1)
