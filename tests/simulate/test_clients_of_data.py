"""Clients that the data names: values of a table's column, and folders ``clients/ID``."""

from __future__ import annotations

import io

import datasets
import numpy as np
import PIL.Image
import pytest

from fedkd.core.errors import DataError, UsageError
from fedkd.simulate.experiment import prepare
from tests.conftest import simulated, tiny

WRITERS = ("9", "10", "2")


def images(count: int = 90):
    """Images whose gray value is their number, with a class and a writer each."""
    for number in range(count):
        pixels = np.full((12, 12, 3), number, np.uint8)
        yield PIL.Image.fromarray(pixels), number % 2, WRITERS[number // 2 % 3]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    rows = []
    for image, label, writer in images():
        image.save(file := io.BytesIO(), "PNG")
        rows.append({"image": file.getvalue(), "label": label, "writer": writer})
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for number, (image, label, writer) in enumerate(images()):
        split = "train" if number < 72 else "test"
        place = root / "clients" / writer / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    return root


def test_each_value_of_a_column_is_a_client(table, tmp_path):
    options = {"dataset": f"hf:{table},test=0.2,pixels=12", "partitioner": "natural-id:column=writer", "rounds": 1}
    assert len(simulated(tmp_path / "run", **options)) == 1
    kept = np.load(tmp_path / "run" / "partition.npz")
    assert kept["seed0_ids"].tolist() == ["2", "9", "10"]
    experiment = prepare(tiny(**options))
    train = experiment.train.pixels[:, 0, 0, 0]
    for ident, rows in zip(("2", "9", "10"), experiment.partition, strict=True):
        numbers = train[rows].tolist()
        assert numbers
        assert {WRITERS[number // 2 % 3] for number in numbers} == {ident}
    private = len(experiment.train) - len(experiment.proxy_rows)
    assert experiment.partition.sizes.sum() == private


def test_each_folder_is_a_client(folder):
    options = {"dataset": f"folder:{folder},pixels=12", "partitioner": "natural-id:column=client"}
    experiment = prepare(tiny(**options))
    assert experiment.partition.ids == ("2", "9", "10")
    numbers = experiment.train.pixels[:, 0, 0, 0]
    assert {WRITERS[n // 2 % 3] for n in numbers[experiment.partition[1]].tolist()} == {"9"}
    assert prepare(tiny(**options | {"partitioner": "iid"})).partition.ids == ()


def test_clients_that_the_data_does_not_name(table, folder):
    for dataset, column, error in (
        (f"hf:{table},test=0.2", "writr", "Unknown column .*'writr'. Did you mean 'writer'"),
        (f"folder:{folder}", "writer", "no column 'writer': .*the column client"),
        ("digits", "client", "no column 'client'"),
    ):
        with pytest.raises(DataError, match=error):
            prepare(tiny(dataset=dataset, partitioner=f"natural-id:column={column}"))


def test_a_client_without_samples_is_named(table):
    options = {"dataset": f"hf:{table},test=0.2", "partitioner": "natural-id:column=writer"}
    with pytest.raises(UsageError, match=r"All samples of client .* are in the proxy or validation set"):
        prepare(tiny(**options, proxy="holdout:size=69", seed=1))


def test_a_client_of_the_test_part_only_is_noted(tmp_path, capsys):
    path = tmp_path / "t.parquet"
    rows = []
    for number, (image, label, _) in enumerate(images()):
        image.save(file := io.BytesIO(), "PNG")
        rows.append({"image": file.getvalue(), "label": label, "writer": f"w{number // 2:02}"})
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    options = {"dataset": f"hf:{path},test=0.4,pixels=12", "partitioner": "natural-id:column=writer"}
    with pytest.raises(UsageError, match=r"use --clients"):
        prepare(tiny(**options, proxy="noise:size=20"))
    assert "test=0.4 leaves " in capsys.readouterr().err
