"""The shape of the code base: imports point one way, and nothing unpickles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fedkd").rglob("*.py"))

# From what knows nobody to what knows everybody. A module imports only from its own rank or below.
RANKS = [
    {"errors", "seeds", "tensors", "catalog", "cache", "runtime", "ensembles", "losses", "optimizers"}
    | {"codecs", "coders", "density", "lazy", "privacy"},
    {"specs", "config", "wire"},
    {"data"},
    {"layers"},
    {"models", "learning"},
    {"terms"},
    {"algorithm", "kit", "students", "quality"},
    {"algorithms", "rounds"},
    {"experiment"},
    {"measure", "runs"},
    {"report", "serving"},
    {"conduct", "distillation", "exports"},
    {"cli"},
    {"flower"},
    {"simulate", "compare", "distill", "serve", "export"},
    {"bench"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def area(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path, at_run_time_only: bool = True) -> set[str]:
    """The modules that a file imports; those behind TYPE_CHECKING are no dependency."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if at_run_time_only and id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "fedkd"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    mine = path.relative_to(ROOT / "fedkd").parts[0].removesuffix(".py")
    if mine == "__init__":
        assert not imports(path)
        return
    assert mine in RANK, f"give {mine} a place in RANKS"
    for module in imports(path):
        if module.startswith("fedkd.") and area(module) in RANK:
            assert RANK[area(module)] <= RANK[mine], f"{mine} imports {module}"


def test_only_flower_and_the_command_import_flwr():
    for path in FILES:
        if any(module == "flwr" or module.startswith("flwr.") for module in imports(path, at_run_time_only=False)):
            # What it is held against is written without fedkd.
            assert path.parent.name == "flower" or path.name in ("simulate.py", "flower_stock.py"), path


def test_only_learning_descends():
    """But for the floor of the benchmark and what it is compared with, which are written to be apart."""
    calling = [path.name for path in FILES if ".backward()" in path.read_text() and path.parent.name != "bench"]
    assert calling == ["learning.py"]


def test_nothing_unpickles():
    for path in FILES:
        text = path.read_text()
        text = re.sub(
            r"torch\.load\([^()]*, weights_only=True\)", "", text
        )  # torch's own reader, which makes tensors only
        assert not re.search(r"\bpickle\.|import pickle|torch\.load|allow_pickle=True", text), path


def test_files_stay_readable():
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 330
