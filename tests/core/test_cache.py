"""The cache: damaged entries are made again, and no run needs a cache."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedkd.core import cache, notes, specs, tensors
from fedkd.core.report.screen import Screen
from fedkd.data import partitioners, readers
from fedkd.distill import teachers
from fedkd.distill.config import DistillConfig
from fedkd.distill.progress import Progress
from fedkd.distill.task import prepare
from fedkd.training.loop import weights_of

LABELS = np.repeat(np.arange(10), 20)
OPTIONS = {"dataset": "digits", "student": "cnn:width=4", "epochs": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    notes.say.cache_clear()


def images() -> str:
    found = readers.read(specs.call("dataset", "noise:size=50,pixels=8"), "train")
    return tensors.digest({"pixels": found.pixels, "labels": found.labels})


def partition() -> str:
    return partitioners.assign("dirichlet:alpha=0.5", LABELS, 4, 0).digest()


def teacher() -> str:
    config = DistillConfig.parse(OPTIONS)
    task, _ = prepare(config)
    config = dataclasses.replace(config, out=str(cache.directory().parent), checkpoint_every=0)
    progress = Progress(config, Screen(Console(quiet=True)))
    module = teachers.trained(task, config, "cnn:width=4", 1, 0, "teacher", progress)
    return tensors.digest(weights_of(module))


KINDS = {"decoded": images, "partitions": partition, "teachers": teacher}


def flipped(content: bytes) -> bytes:
    source, array = random.Random(0), bytearray(content)
    for place in source.sample(range(len(array) // 2, len(array)), min(1000, len(array) // 4)):
        array[place] ^= 1 << source.randrange(8)
    return bytes(array)


DAMAGES = {"flipped bytes": flipped, "truncated": lambda content: content[:-9], "empty": lambda content: b""}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_made_again_and_reported_once(tmp_path, capsys, kind, damage):
    first = KINDS[kind]()
    paths = list((tmp_path / "cache" / kind).iterdir())
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert KINDS[kind]() == first
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"fedkd: {path} is damaged; it is made again." for path in paths]
    assert KINDS[kind]() == first
    assert not capsys.readouterr().err, "it was repaired"


def test_a_label_that_is_no_class_is_not_believed(tmp_path):
    first = images()
    (path,) = (tmp_path / "cache" / "decoded").iterdir()
    kept, about = tensors.read(path)
    labels = kept["labels"].clone()
    labels[3] = 77
    tensors.save({**kept, "labels": labels}, path, about)
    assert images() == first


def test_a_file_under_the_name_of_another_one_is_not_believed(tmp_path):
    folder = tmp_path / "cache" / "partitions"
    digests, paths = [], []
    for clients in (4, 5):
        digests.append(partitioners.assign("dirichlet:alpha=0.5", LABELS, clients, 0).digest())
        paths += set(folder.iterdir()) - set(paths)
    paths[0].replace(paths[1])
    assert partitioners.assign("dirichlet:alpha=0.5", LABELS, 5, 0).digest() == digests[1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_of_a_file_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cache") / "file.safetensors"
    kept = {"a": torch.arange(6), "b": torch.zeros(0), "c": torch.tensor(1.5)}
    tensors.save(kept, path, {cache.CHECKSUM: cache._checksum("name", kept)})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    found = cache._read(path, "name")
    assert found is None or tensors.equal(found, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_without_a_cache_that_is_a_file(tmp_path, monkeypatch, capsys, kind):
    first = KINDS[kind]()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "file"))
    capsys.readouterr()
    assert KINDS[kind]() == first
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedkd: the cache {tmp_path / 'file'} cannot be written (Not a directory); the run does")
