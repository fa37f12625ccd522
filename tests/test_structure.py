"""The structure of the code base: imports point one way, and nothing unpickles."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fedkd").rglob("*.py"))

# From the lowest to the highest. A file imports from its own folder and from lower ranks.
RANKS = [
    {"core"},
    {"data"},
    {"training"},
    {"algorithms"},
    {"simulate", "distill", "export", "serve"},
    {"compare", "list", "partition", "doctor"},
    {"reproduce"},
    {"bench"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path, at_run_time_only: bool = True) -> set[str]:
    """The modules that a file imports; those behind TYPE_CHECKING are no dependency."""
    return _imports(path, at_run_time_only, anywhere=True)


def imports_on_load(path: Path) -> set[str]:
    """The modules that are imported when a file is; those inside functions are imported later."""
    return _imports(path, True, anywhere=False)


@cache
def _imports(path: Path, at_run_time_only: bool, anywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if (at_run_time_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (not anywhere and isinstance(node, ast.FunctionDef))
        for inner in ast.walk(node)
    }
    modules = {module_of(file) for file in FILES}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "fedkd").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not [module for module in imports(path) if module.startswith("fedkd.")]
        return
    assert own in RANK, f"give {own} a place in RANKS"
    for module in imports(path):
        if module.startswith("fedkd.") and area(module) != own:
            assert RANK[area(module)] < RANK[own], f"{own} imports {module}"


def test_there_are_no_import_cycles():
    """Not inside a folder either. A name that is imported inside a function is not needed to load the file."""
    graph = {
        module_of(path): {m for m in imports_on_load(path) if m.startswith("fedkd.")} - {module_of(path)}
        for path in FILES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_top_level_is_short_and_its_names_differ():
    names = [path.stem for path in (ROOT / "fedkd").iterdir() if path.name != "__pycache__"]
    assert len(names) <= 16
    stems = [re.sub(r"(ations?|ing|ers?|ors?|ments?|es|s|e)$", "", name) for name in names if not name.startswith("_")]
    assert len(set(stems)) == len(stems), sorted(stems)


def test_only_flower_and_the_command_import_flwr():
    for path in FILES:
        if any(module == "flwr" or module.startswith("flwr.") for module in imports(path, at_run_time_only=False)):
            # flower_stock.py is a comparison that is written without fedkd.
            assert path.parent.name == "flower" or path.name == "flower_stock.py", path


def test_only_the_training_loops_call_backward():
    """Except in the benchmark: its lower bound and the tools it compares with are written to be independent."""
    calling = [path.name for path in FILES if ".backward()" in path.read_text() and path.parent.name != "bench"]
    assert calling == ["loop.py", "stacked_loop.py"]


def test_nothing_unpickles():
    for path in FILES:
        text = path.read_text()
        text = re.sub(
            r"torch\.load\([^()]*, weights_only=True\)", "", text
        )  # torch's own reader, which makes tensors only
        assert not re.search(r"\bpickle\.|import pickle|torch\.load|allow_pickle=True", text), path


def test_files_stay_readable():
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 330
