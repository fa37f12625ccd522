"""The names that `fedkd` exports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fedkd
from fedkd.core import tensors
from tests.conftest import ROOT, tiny


def declared() -> dict[str, tuple[str, str]]:
    """What type checkers see: each name, the module that it is imported from, and its name there."""
    tree = ast.parse(Path(fedkd.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        str(alias.asname): (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_exported_names_are_those_that_type_checkers_see():
    assert sorted(declared()) == sorted(fedkd.__all__)
    for name, (module, attribute) in declared().items():
        assert getattr(fedkd, name) is getattr(import_module(module), attribute)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'simulation'"):
        fedkd.simulation  # noqa: B018


def test_importing_fedkd_imports_nothing_heavy():
    code = "import sys, fedkd; print([name for name in ('torch', 'flwr', 'pydantic', 'numpy') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_student_is_loaded_from_a_path_or_its_text(tmp_path):
    run = fedkd.run_simulation(tiny(rounds=1, out=str(tmp_path / "run")))
    students = [fedkd.load_student(path) for path in (run, str(run), run / "student.safetensors")]
    assert len({tensors.digest(student.weights) for student in students}) == 1


def test_a_script_without_a_guard_runs_once(tmp_path):
    """Also if it has imported torch, so that workers are spawned: they do not import it."""
    (tmp_path / "script.py").write_text(
        "import torch, fedkd\nprint('once')\n"
        "options = dict(dataset='digits', model='cnn:width=4', clients=2, rounds=1, workers='2', seeds=1)\n"
        "fedkd.run_simulation(fedkd.Config(**options, proxy='holdout:size=20', out='run'))\n"
    )
    done = program(["script.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert "Traceback" not in done.stderr


def program(arguments, folder, **options):
    """What a Python process gives that runs in a folder, and knows fedkd."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **options)


NOTEBOOK = """
import torch, fedkd
from functools import partial
from fedkd.algorithms.dsfl import DSFL
from fedkd.training.models import cnn

class Net(torch.nn.Sequential):
    def __init__(self, classes: int) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, classes))

def halves(labels, clients, seed):
    return [list(range(part, len(labels), clients)) for part in range(clients)]

options = dict(dataset="digits", clients=2, proxy="holdout:size=20", local_epochs=1, distill_epochs=1)
for row in fedkd.rounds(**options, algorithm=DSFL(temperature=0.2), model=[Net, partial(cnn, width=4)], rounds=3,
                        partitioner=halves, student=Net, out="run"):
    print("round", row["round"], len(fedkd.load("run").rounds))
    if row["round"] == 2:
        break
rest = list(fedkd.rounds(resume="run"))
print("rest", [row["round"] for row in rest])
run = fedkd.load("run")
print(run.config["model"], run.config["algorithm"], run.config["partitioner"])
print(run.plot()._repr_png_()[1:4])
print(run.global_model(model=Net)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape)
try:
    fedkd.run(**options, model=Net, workers="2")
except fedkd.UsageError as error:
    print(error)
"""


def test_a_program_with_its_own_objects_round_by_round(tmp_path):
    """As a notebook: what it defines is in no file that another process could import."""
    done = program(["-"], tmp_path, input=NOTEBOOK)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shown = [line for line in done.stdout.splitlines() if line]
    assert [line for line in shown if line.startswith(("round 1", "round 2", "round 3"))] == ["round 1 1", "round 2 2"]
    assert "rest [3]" in shown
    hint = "fedkd: continue with: fedkd.run(resume='run') in the program that defines --partitioner __main__:halves"
    assert hint in done.stderr
    refused = program(["-m", "fedkd.simulate", "--resume", "run", "--rounds", "4"], tmp_path)
    assert "is known only to the program or notebook that defines it" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "__main__:Net,cnn:width=4 dsfl:temperature=0.2 __main__:halves" in shown
    assert "b'PNG'" in shown
    assert "torch.Size([1, 10])" in shown
    assert shown[-1].startswith("--model __main__:Net is known only in the process that defines it, but --workers 2 ")
