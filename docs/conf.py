"""Settings of Sphinx: the source is the whole folder, so that links between pages are those of the files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "fedkd"
author = copyright = "The fedkd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "simulations/README.md", "docs/**.md"]
exclude_patterns = [".venv", "build", "dist", "fedkd", "mutants", "runs", "tests"]  # folders that are not searched

myst_heading_anchors = 4  # as on GitHub
smartquotes_action = "D"  # only dashes

# Docstrings have names in single backticks: links where the name is on a page.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "fedkd"
html_copy_source = False
html_static_path = ["site/style.css"]
html_css_files = ["style.css"]
html_extra_path = ["site/index.html"]  # leads to the first page


def as_site(app, name, source):
    """Complete a page by what only the site has: contents on the first page, and a list of the decisions."""
    folder = (ROOT / name).parent
    # A folder, which GitHub shows, has no page: the text of the link stays.
    text = re.sub(r"\[([^]]*)\]\(([^)#:]+)\)", lambda link: link[1 if (folder / link[2]).is_dir() else 0], source[0])
    if name == root_doc:
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
            pages = [f"{words} <{page}>" for words, page in re.findall(r"\[(.*?)\]\((\S+?)\.md\)", section)]
            text += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])
    if name == "docs/decisions/README":
        text += "\n```{toctree}\n:glob:\n\n0*\n```\n"
    source[0] = text


def setup(app):
    """Complete each page when it is read."""
    app.connect("source-read", as_site)
