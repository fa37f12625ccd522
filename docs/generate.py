"""Writes the pages that are made of something else: ``python docs/generate.py``. A test holds them to it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

from fedkd.core.cli import shown
from fedkd.core.config import Config
from fedkd.distill.config import DistillConfig

HERE = Path(__file__).parent
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\S+\.(?:py|toml|mplstyle))\n")  # the first line of a block that is a file


INTRODUCTION = """\
# Options

Made of the definitions in the code, as `--help` is. Flags override `FEDKD_*` variables (`FEDKD_ROUNDS=3`), which
override the scenario file. In Python names have underscores (`fedkd.run(local_epochs=1)`). Components such as methods,
data sets and models are *specs*, `name:key=value,...`; `python -m fedkd.list` shows them with their own options."""


def options_page() -> str:
    """A table for each group of options of the two commands with the most."""
    lines = [INTRODUCTION]
    for command, config in (("simulate", Config), ("distill", DistillConfig)):
        lines += ["", f"## fedkd.{command}"]
        groups: dict[str, list[str]] = {}
        for field in dataclasses.fields(config):
            extra = field.default.json_schema_extra
            default = shown(field.default.default)
            groups.setdefault(extra["group"], []).append(
                f"| `--{field.name.replace('_', '-')}` | {f'`{default}`' if default else ''} "
                f"| {_escaped(field.default.description)} |"
            )
        for group, rows in groups.items():
            lines += ["", f"### {group}", "", "| option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """A help text in a cell of a table: options and commands as code, all else as it is."""
    text = re.sub(r"([|*<_])", r"\\\1", text)
    return re.sub(r"(?<!\S)(--[a-z][a-z-]*[a-z]|python -m fedkd\.\w+(?: [a-z]+)?)", r"`\1`", text)


def cells(page: str) -> list[tuple[str, str]]:
    """The cells of a page as a notebook: (markdown or code, text)."""
    found, end = [], 0
    for block in BLOCK.finditer(page):
        found += [("markdown", page[end : block.start()]), ("code", code(block[1], block[2]))]
        end = block.end()
    return [(kind, text.strip()) for kind, text in [*found, ("markdown", page[end:])] if text.strip()]


def code(language: str, text: str) -> str:
    """A block as a cell of code: a file is written, a command is run by the shell."""
    if file := FILE.match(text):
        return f"%%writefile {file[1]}\n{text[file.end() :]}"
    return text if language == "python" else re.sub(r"^(?! )", "!", text.rstrip(), flags=re.MULTILINE)


def notebook() -> str:
    """The tour as a notebook, without outputs."""
    made = []
    for number, (kind, text) in enumerate(cells((HERE / "tour.md").read_text())):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


PAGES: dict[str, Callable[[], str]] = {"options.md": options_page, "tour.ipynb": notebook}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
