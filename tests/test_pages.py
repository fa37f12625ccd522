"""Each block of the pages: it is run here, those of a page in order in one folder, or stands below with a reason.

Runs are small here: digits instead of CIFAR-10, a step of training, few clients. All else is as the page says.
"""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fedkd
from fedkd.compare import sweep
from fedkd.core import cli, options
from fedkd.core.config import Config
from fedkd.simulate import simulate
from tests.conftest import ROOT

GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LANGUAGES = {"python", "bash", "toml", "text", "{eval-rst}"}
#: Pages whose blocks are run elsewhere.
ELSEWHERE = {
    "docs/deployment.md": "tests/simulate/test_deployment.py runs them over TLS",
    "docs/reproducing.md": "minutes; tests/test_reproduce.py has small tables",
}
#: Other programs, and why they are not run.
PROGRAMS = {
    **dict.fromkeys(("pip", "python3", "jupyter"), "installs, or does not end by itself"),
    **dict.fromkeys(("make", "pytest"), "lint, types and all tests"),
    **dict.fromkeys(("docker", "mkdir", "ray"), "needs Docker, or several machines"),
    "tensorboard": "does not end by itself",
    "curl": "needs a server; tests/serve",
}
#: Parts of commands that are not run, and why.
NOT_RUN = {
    "fedkd.serve": "does not end by itself; tests/serve",
    "fedkd.bench": "measures for minutes; tests/bench",
    "fedkd.reproduce": "minutes; tests/test_reproduce.py",
    "fedkd.export": "traces a network, seconds; tests/export",
    "fedkd.distill": "seconds for each network; tests/distill, and tests/test_docs.py checks the options",
    **dict.fromkeys(("./mine.py:Letters", "./mine.py:Net", "./mine.py:every_other"), "as in docs/own-code.md"),
    **dict.fromkeys((":photos,test=0.2 --clients 5", "table.parquet"), "as in docs/own-data.md"),
    "natural-id:column=client": "needs a folder for each client; tests/data/test_folders.py",
    "few-shot": "digits has too few samples of a class",
    "pretrained=resnet18": "a file of torchvision's that is downloaded; tests/simulate/test_pretrained.py",
    "--engine ray": "starts Ray, ten seconds; tests/simulate/test_engines.py",
    "--tracker tensorboard": "imports TensorBoard, seconds; tests/simulate/test_trackers.py",
    "--device cuda": "needs a GPU",
    "-m pytest -m gpu": "needs a GPU",
    "--clients 100000": "half a minute",
}
#: Options of Config that a run has here, and the largest values of others.
SMALL = {"local_steps": 1, "distill_steps": 1, "workers": "1", "client_test_samples": 20}
LARGEST = {"clients": 5, "rounds": 1, "seeds": 1, "validation": 20}


def small(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that takes a fraction of a second."""
    made = options.underscored(values) | SMALL
    made |= {key: min(int(made[key]), most) for key, most in LARGEST.items() if key in made}
    if made.get("dataset", "auto") in ("auto", "cifar10"):
        made["dataset"] = "digits"
    if made.get("proxy", "holdout") == "holdout" or "cifar100" in made["proxy"]:
        made["proxy"] = "holdout:size=20"
    return {"model": "cnn:width=4", "clients": 5, "rounds": 1} | made


def complete(command: str, config: Config, out: Path, about: str) -> None:
    """Run a cell of a sweep in this process, if it has not been run."""
    if not (out / "result.json").exists():
        simulate(dataclasses.replace(config, out=str(out)))


@pytest.fixture(autouse=True)
def _small_runs(monkeypatch, tmp_path):
    """All configs are small, however they are given; commands are run in a folder with the scenario files."""
    original = Config.parse
    monkeypatch.setattr(Config, "parse", lambda values, sources=None: original(small(values), sources))
    monkeypatch.setattr(sweep, "complete", complete)
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs that pages call RUN."""
    made = []
    for number, methods in enumerate((["fedavg", "dsfl:temperature=0.1"], ["ensemble"])):
        out = tmp_path_factory.mktemp("runs") / f"run{number}"
        given = small({"algorithm": methods[0], "compare": methods[1:], "out": str(out), "rounds": 1})
        made.append(str(fedkd.run(**given).path))
    return made


def commands(block: str) -> list[str]:
    """The commands of a block, without comments."""
    lines = re.sub(r"\\\n\s*", " ", block).replace(".venv/bin/", "").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"(^|\s{2,})#.*", "", line).split(" && ") if part.strip()]


def reason_not_to_run(command: str) -> str:
    """Why a command is not run; empty if it is."""
    found = [why for part, why in NOT_RUN.items() if part in command]
    return PROGRAMS.get(command.split()[0], "") or "".join(found[:1])


def execute(command: str, runs: list[str]) -> None:
    """Run a command of fedkd in this process; RUN is a run, and a second RUN another one."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], f"give a reason: {command}"
    for run in runs:
        words = [run if word == "RUN" and words.index("RUN") == at else word for at, word in enumerate(words)]
    module, _, app = cli.COMMANDS[words[2].removeprefix("fedkd.")][0].partition(":")
    with pytest.raises(SystemExit) as ended:
        cli.run(getattr(import_module(module), app), words[3:])
    assert ended.value.code == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_run(page, runs, tmp_path):
    names: dict[str, Any] = {}
    for language, block in GENERATED["BLOCK"].findall((ROOT / page).read_text()):
        if page in ELSEWHERE:
            continue
        assert language in LANGUAGES, f"{page}: a block in {language or 'no language'}"
        if file := GENERATED["FILE"].match(block):
            (tmp_path / file[1]).write_text(block)
        elif language == "python":
            exec(compile(block, page, "exec"), names)
        elif language == "bash":
            for command in commands(block):
                if not reason_not_to_run(command):
                    execute(command, runs)


def test_each_reason_is_that_of_a_command():
    """What is not on a page any more needs no reason."""
    text = "\n".join((ROOT / page).read_text().replace("\\\n", "") for page in PAGES)
    assert not [part for part in (*NOT_RUN, *PROGRAMS) if part not in text]


@pytest.mark.parametrize("name", GENERATED["PAGES"])
def test_generated_pages_are_those_of_their_sources(name):
    assert (ROOT / "docs" / name).read_text() == GENERATED["PAGES"][name](), "run: python docs/generate.py"


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r":: fedkd\.(\w+)(?:\(.*\))?$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fedkd.__all__)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_tour_runs_as_a_notebook(tmp_path, monkeypatch):
    """Its cells in a kernel of Jupyter; only one round, and one run of the sweep."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    text = (ROOT / "docs" / "tour.ipynb").read_text()
    for long, short in (('\\"rounds\\": 5', '\\"rounds\\": 1'), (', \\"iid\\"]', "]"), (', \\"fedavg\\"]', "]")):
        assert long in text
        text = text.replace(long, short)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = {kind for output in outputs for kind in output.get("data", ())}
    assert {"text/markdown", "text/html", "image/png"} <= shown, "a table, a DataFrame, a figure"
    assert any("\\toprule" in output.get("text", "") for output in outputs), "the command ran"
