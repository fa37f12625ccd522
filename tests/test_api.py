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
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert "Traceback" not in done.stderr
