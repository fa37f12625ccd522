"""The words of the documentation and of the help texts: those of PyTorch, scikit-learn and Flower."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from fedkd.core.cli import COMMANDS
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "simulations" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "simulations").glob("*.toml")),
]

#: Home-made words, and what to write instead.
FORBIDDEN = {
    r"\b(?:is|are|be|been|were|was) played\b|\bplays? (?:a|the) (?:client|method|run)|\bplayed apart\b": "is run",
    r"\bcounted apart\b": "counted separately",
    r"(?<!in )\bturns?\b(?! (?:a|the|it|off|on|into|names))": "a local update, a round",
    r"\b(?:is|are|was|were) told\b|\btells? apart\b": "receives, sends",
    r"\b(?:is|are) heard by\b|\bhears?\b": "applies to, uses",
    r"\bclients?(?:'s?)? (?:answers?|says?)\b": "computes logits, uploads",
    r"\bdigests?\b(?! of)": "local distillation",
    r"\brows? (?:is|are) dealt\b|\bdeals?\b|\bdealt\b": "samples are assigned",
    r"--votes\b|\bvotes weigh": "--weighting",
    r"--up\b|--down\b": "--uplink-codec, --downlink-codec",
    r"\btravels?\b": "is transmitted",
    r"\bsomebody\b|\bwhoever\b|\bnobody\b|\beverybody\b": "a user, a client, none, all",
    r"\bgo(?:es)? (?:up|down) (?:the|with)\b": "is uploaded, is broadcast",
    r"\bpulls? (?:the|a|its|their) (?:small )?student\b": "a distillation loss",
    r"\bthe kit\b": "the trainer, the setup",
    r"\bframed\b": "serialized",
}


def prose(text: str) -> str:
    """A Markdown text without code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def faults(text: str) -> list[str]:
    return [
        f"{found[0]!r}: write {better} ({text[max(0, found.start() - 40) : found.end() + 30]!r})"
        for pattern, better in FORBIDDEN.items()
        for found in re.finditer(pattern, text)
    ]


def test_the_check_finds_what_it_should():
    assert len(faults("Methods are played. A client answers in its turn. It is told the labels.")) == 4
    assert not faults("Models are assigned to clients in turn. A method is run.")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_the_words_of_the_field(path):
    assert not faults(prose(path.read_text()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_pages_are_short(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|") and "http" not in line]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_use_the_words_of_the_field(name):
    done = subprocess.run(
        [sys.executable, "-m", f"fedkd.{name}", "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())
    assert not faults(words)


def test_messages_and_docstrings_use_the_words_of_the_field():
    """Every string in the source, docstrings and error messages included."""
    found = []
    for path in sorted((ROOT / "fedkd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found += [f"{path.relative_to(ROOT)}:{node.lineno}: {fault}" for fault in faults(prose(node.value))]
    assert not found, "\n".join(found)
