"""What the documents say, held to what is there."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedkd import distill
from fedkd.compare import reading
from fedkd.core.config import Config
from fedkd.core.options import from_file
from fedkd.core.report import students, table
from fedkd.distill.config import DistillConfig
from fedkd.simulate import checks, simulate
from tests.conftest import tiny

ROOT = Path(__file__).parents[1]
RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-code.md").read_text(), re.DOTALL)
COMMANDS = re.findall(
    r"^python -m fedkd\.simulate (.*?)(?:\s{2,}#.*)?$",
    ((ROOT / "README.md").read_text() + (ROOT / "docs/gpu.md").read_text()).replace("\\\n", ""),
    re.MULTILINE,
)


def test_the_recipes_are_short():
    """They are run by test_pages.py."""
    assert len(RECIPES) == 6
    assert all(len(recipe.strip().splitlines()) <= 16 for recipe in RECIPES), "fifteen, and the name of the file"


def test_the_readmes_commands_are_valid(monkeypatch):
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        words = shlex.split(command)
        values: dict[str, object] = {}
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                values |= from_file(ROOT / word)
                continue
            taken = []
            while words and not words[0].startswith("--"):
                taken.append(words.pop(0))
            values[word[2:].replace("-", "_")] = taken if len(taken) > 1 else taken[0]
        values = {key: value for key, value in values.items() if "./mine.py" not in str(value)}
        checks.check(Config.parse(values))


DISTILLED = re.findall(
    r"^\s*python -m fedkd\.distill (.*?)(?:\s{2,}#.*)?$",
    (ROOT / "README.md").read_text() + (ROOT / "docs/distillation.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("command", DISTILLED)
def test_commands_of_distillation_are_valid(command):
    words = shlex.split(command)
    distill.check(DistillConfig.parse({words[i].removeprefix("--"): words[i + 1] for i in range(0, len(words), 2)}))


NAMED_FILES = [ROOT / name for name in (".ci/run", "Makefile", "pyproject.toml", "README.md", "CONTRIBUTING.md")]
NAMED_FILES += [*(ROOT / "docs").glob("*.md"), *(ROOT / "fedkd").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]


def test_files_that_are_named_exist():
    """A command that ignores a file which is not there ignores nothing, without an error."""
    pattern = re.compile(r"(?<![\w/.])(?:fedkd|tests|docs|simulations)/[\w/.-]+\.(?:py|md|toml|json|html|png|svg)\b")
    named = [(path.name, name) for path in NAMED_FILES for name in pattern.findall(path.read_text())]
    assert len(named) > 20
    assert not [each for each in named if not (ROOT / each[1]).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / "simulations").glob("*.toml")), ids=lambda path: path.name)
def test_scenarios_are_valid(path):
    values = tomllib.loads(path.read_text())
    if "epochs" in values:
        distill.check(DistillConfig.parse(values))
    else:
        checks.check(Config.parse(values))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "simulations/README.md"]
)
def test_links_exist(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def documented(title):
    """The keys that a section of the page on output files lists, and all names in its text."""
    page = (ROOT / "docs" / "output-files.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith(f"{title}\n"))
    listed = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}, set(re.findall(r"`(\w+)`", section))


def test_every_key_of_a_run_is_documented_and_every_documented_key_is_there(tmp_path):
    simulate(tiny(out=str(tmp_path / "run"), rounds=1, validation=30, local_test=0.1))
    result, environment = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("result", "env"))
    row = json.loads((tmp_path / "run" / "rounds.jsonl").read_text())
    only_after_an_error = {"code", "message"}
    keys = result.keys() | result["runs"][0].keys()
    assert keys == documented("result.json of fedkd.simulate")[0] - only_after_an_error
    assert row.keys() == documented("rounds.jsonl")[0]
    assert environment.keys() == documented("env.json")[0]
    with np.load(tmp_path / "run" / "partition.npz") as arrays:
        names = {name.replace("seed0", "seedN") for name in arrays}
        assert names | {"seedN_ids"} == documented("partition.npz")[0]


def keys_of(value):
    """All keys of a JSON value that are names of fields, not of corruptions, batch sizes or stacks."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    return value.keys() | set().union(*(keys_of(each) for name, each in value.items() if name not in NAMED))


NAMED = {"corruptions", "latency_ms", "machine", "work"}  # objects whose keys are names


def test_every_key_of_the_published_results_is_documented():
    results = json.loads((ROOT / "simulations" / "distill" / "logits" / "result.json").read_text())
    assert keys_of(results) <= documented("result.json of fedkd.distill")[1]
    for name in ("bench", "idle-many"):
        bench = json.loads((ROOT / "simulations" / "bench" / f"{name}.json").read_text())
        stacks = set().union(*(bench[part].keys() for part in ("fedavg", "ensemble", "idle", "many") if part in bench))
        threads = set(bench.get("peak", {}))
        assert keys_of(bench) - stacks - threads <= documented("bench.json")[1]


def published(grid):
    """Whether each row of a table stands among the results."""
    lines = (ROOT / "simulations" / "README.md").read_text().splitlines()
    return all(text in lines for text in grid.markdown().splitlines() if text.startswith("|"))


def run_files(directory):
    return [reading.read_run(path) for path in sorted(directory.iterdir()) if path.is_dir()]


COMPARED = [ROOT / "simulations" / "main", *sorted((ROOT / "simulations" / "family").iterdir())]


@pytest.mark.parametrize("runs", COMPARED, ids=lambda path: path.name)
def test_the_tables_of_the_results_are_those_of_the_rounds_beside_them(runs):
    """Which seeds and methods there are is read off the files."""
    assert published(table.side_by_side(*reading.simulated(run_files(runs))))


def test_the_table_of_distillations_is_that_of_the_results_beside_it():
    assert published(students.side_by_side(reading.distilled(run_files(ROOT / "simulations" / "distill"))))


def test_the_pictures_are_those_that_their_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))
    for name, picture in script["PICTURES"].items():
        assert (ROOT / "docs" / "pictures" / name).read_text() == picture(), f"run docs/pictures/draw.py: {name}"
