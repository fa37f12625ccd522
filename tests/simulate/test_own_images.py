"""Runs on folders of images: resumed, exported, and started from weights of other classes."""

from __future__ import annotations

import shutil

import numpy as np
import PIL.Image
import pytest

from fedkd.core.errors import ResumeError
from fedkd.data import loading
from fedkd.export import export
from fedkd.simulate import experiment
from fedkd.training.models import checkpoint
from tests.conftest import simulated
from tests.simulate.test_resume import resume


def write(root, names: str = "abc", each: int = 12, seed: int = 0) -> None:
    """Classes of images of one brightness, with some noise."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(each):
            image = rng.integers(80 * number, 80 * number + 60, (12, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(root / name / f"{index}.png")


@pytest.fixture(autouse=True)
def _forget(tmp_path, monkeypatch):
    """Each run is of a process of its own."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


def run(out, **changes):
    simulated(out, **changes)
    return out


def forget() -> None:
    loading.read.cache_clear()
    experiment.prepared.cache_clear()


def options(root, **changes):
    given = {
        "dataset": f"folder:{root}/set,pixels=16,test=0.25",
        "clients": 2,
        "model": "cnn:width=2",
        "proxy": "noise:size=8",
    }
    return given | {"rounds": 1, "partitioner": "iid"} | changes


@pytest.mark.parametrize("change", ["moved", "pixels", "renamed", "proxy"])
def test_a_run_whose_images_changed_is_not_resumed(change, tmp_path):
    write(tmp_path / "set")
    write(tmp_path / "public", "x", seed=1)
    out = run(tmp_path / "run", **options(tmp_path, proxy=f"folder:{tmp_path}/public"))
    forget()
    place = tmp_path / "set"
    if change == "moved":
        (place / "a" / "3.png").rename(place / "b" / "moved.png")
    elif change == "pixels":
        PIL.Image.new("RGB", (16, 12)).save(place / "a" / "3.png")
    elif change == "renamed":
        (place / "a").rename(place / "z")
    else:
        (tmp_path / "public" / "x" / "0.png").unlink()
    what = "--proxy folder:" if change == "proxy" else "folder:"
    with pytest.raises(ResumeError, match=f"^{what}.* changed after the run in .* began; start a new run"):
        resume(out, rounds=2)


def test_a_run_is_resumed_where_its_images_were_only_copied(tmp_path):
    write(tmp_path / "set")
    out = run(tmp_path / "run", **options(tmp_path))
    forget()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "copy").rename(tmp_path / "set")
    resume(out, rounds=2)


def test_a_student_is_exported_although_the_test_folder_lacks_a_class(tmp_path):
    write(tmp_path / "set" / "train")
    write(tmp_path / "set" / "test", "bc", 4, seed=1)
    out = run(tmp_path / "run", **options(tmp_path, dataset=f"folder:{tmp_path}/set,pixels=16"))
    export(out, to=("pt2",))
    assert checkpoint.load(out).names == ("a", "b", "c")


def test_weights_of_other_classes_are_reported(tmp_path, capsys):
    write(tmp_path / "set")
    out = run(tmp_path / "run", **options(tmp_path))
    shutil.rmtree(tmp_path / "set")
    write(tmp_path / "set", "xyz")
    forget()
    model = f'cnn:width=2,pretrained="{out}/student.safetensors"'
    simulated(tmp_path / "other", **options(tmp_path, model=model))
    assert (
        f"{out}/student.safetensors is of other classes (a, b, c); its last layer is kept." in capsys.readouterr().err
    )


def test_a_name_in_colons_is_no_emoji(tmp_path, capsys):
    write(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "one")
    simulated(tmp_path / "run", **options(tmp_path, dataset=f"folder:{tmp_path}/one,test=0.25", proxy="holdout:size=5"))
    assert "/one," in capsys.readouterr().out
