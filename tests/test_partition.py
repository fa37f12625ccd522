"""``fedkd.partition``: what it shows is the partition of a run."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedkd.core import cli
from fedkd.core.report import shares
from fedkd.partition import app
from fedkd.simulate import simulate
from tests.conftest import tiny

OPTIONS = {"clients": 7, "partitioner": "dirichlet:alpha=0.3", "validation": 50, "local_test": 0.2, "seed": 3}
FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
FLAGS += ["--dataset=digits", "--proxy=holdout:size=40"]


def called(capsys, *arguments):
    """The exit code, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.run(app, list(map(str, arguments)))
    return ended.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    simulate(tiny(rounds=1, out=str(out), **OPTIONS))
    return out


def test_it_is_the_partition_of_a_run(run, capsys):
    """With the flags, and with the file of the run, which has all other options too."""
    result = json.loads((run / "result.json").read_text())["runs"][0]
    arrays = np.load(run / "partition.npz")
    shown = [json.loads(called(capsys, *given, "--format=json")[1]) for given in (FLAGS, [run / "config.toml"])]
    assert shown[0] == shown[1]
    assert shown[0]["partition_sha256"] == result["partition_sha256"]
    assert shown[0]["counts"] == arrays["seed3_counts"].tolist()
    assert shown[0]["skew"]["distance"] == pytest.approx(result["partition_distance"], abs=1e-6)
    assert shown[0]["proxy_samples"] == len(arrays["seed3_proxy"]) == sum(shown[0]["proxy_counts"])
    assert shown[0]["local_test_samples"] == np.diff(arrays["seed3_local_test_ends"], prepend=0).tolist()
    assert shown[0]["fewer_than_a_batch"] == sum(size < 32 for size in shown[0]["samples"])


def test_all_formats_have_the_same_counts(run, capsys):
    counts = np.load(run / "partition.npz")["seed3_counts"]
    text = called(capsys, *FLAGS, "--format=csv")[1]
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["client", "samples", *map(str, range(10))]
    assert [[int(cell) for cell in row[2:]] for row in rows[1:]] == counts.tolist()
    for form, separator in (("markdown", "|"), ("latex", "&"), ("terminal", None)):
        lines = called(capsys, *FLAGS, f"--format={form}")[1].splitlines()
        (line,) = (each for each in lines if each.strip("| ").startswith("6 "))
        cells = [cell.strip(" |\\") for cell in line.strip("|").split(separator)]
        assert [0 if cell == "·" else int(cell) for cell in cells[-10:]] == counts[6].tolist()


def test_many_clients_are_shown_by_quantiles(capsys):
    code, text, _ = called(capsys, "--dataset=digits", "--clients=200", "--partitioner=iid")
    assert code == 0
    assert len(text.splitlines()) < 50
    assert "The first 10 of 200 clients." in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith((" smallest", " largest"))] == ["5", "6"]
    assert "200 clients with fewer samples than a batch of 32" in text


def test_names_that_do_not_fit_are_numbers():
    wide = shares.Shares(np.full((3, 10), 1234), ["a long name"] * 10)
    assert wide.short(200).titles[-1] == "a long name"
    assert wide.short(100).titles[-1] == "9"
    assert Console(width=100).measure(wide.short(100).rich()).maximum <= 100


def test_classes_that_do_not_fit_are_shades():
    counts = np.arange(304).reshape(2, 152)
    grid = shares.Shares(counts, list(map(str, range(152)))).short(80)
    assert Console().measure(grid.rich()).maximum <= 80
    assert grid.rows[1][-1][-1] == "█"
    assert "4 classes" in grid.caption


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--partitioner=own"], 2, "--partitioner own"),
        (["--partitioner=irid"], 2, "Did you mean 'iid'"),
        (["--clients=5000"], 2, "cannot share"),
        (["--rounds=3"], 2, "--rounds"),
        (["--out=picture.jpg"], 2, "--out picture.jpg"),
        (["--partitioner=./missing.py:Name"], 7, "there is no file"),
        (["--partitioner={}:raises"], 7, "ZeroDivisionError"),
        (["--partitioner={}:twice"], 7, "more than once"),
    ],
)
def test_mistakes_are_one_sentence(arguments, code, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def raises(labels, clients, seed):\n    1 / 0\ndef twice(labels, clients, seed):\n    return [[0]] * clients\n"
    )
    given = [each.format(tmp_path / "mine.py") for each in arguments]
    ended, _, error = called(capsys, "--dataset=digits", *given)
    assert (ended, error.count("\n")) == (code, 1)
    assert message in error


@pytest.mark.usefixtures("images_of_figures")
@pytest.mark.parametrize(("clients", "classes"), [(10, 10), (30, 100)])
def test_a_picture_is_as_wide_as_a_column(clients, classes, tmp_path):
    counts = np.random.default_rng(0).integers(0, 50, (clients, classes))
    counts[0] = 0
    shares.Shares(counts, [f"a long name {each}" for each in range(classes)]).draw(tmp_path / "picture.png", "title")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 3.3 * 300
        assert len(picture.getcolors(2**20)) > 20


def test_the_kinds_of_pictures(tmp_path, capsys):
    for suffix in ("png", "svg", "pdf"):
        assert called(capsys, *FLAGS, f"--out={tmp_path}/picture.{suffix}")[0] == 0
        assert (tmp_path / f"picture.{suffix}").exists()
