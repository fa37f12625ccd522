"""A table as text, for a terminal, a document or a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

Format = Literal["terminal", "markdown", "latex"]
LINE = 66  # characters, and two for the space after a column, that fit on a line of a paper in LaTeX
_GREEK = "alpha beta gamma delta epsilon eta theta lambda mu nu pi rho sigma tau phi omega Sigma Omega"
#: What LaTeX reads as a command, and signs of our tables that not all of its fonts have.
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%#_${}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": "$<$",
    ">": "$>$",
    "[": "{[}",  # after a line break it would begin an option of that
    "±": r"$\pm$",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "–": "--",
    "†": r"\textdagger{}",
    "…": r"\dots{}",
    **{sign: rf"$\{name}$" for sign, name in zip("αβγδεηθλμνπρστφωΣΩ", _GREEK.split(), strict=True)},
}


@dataclass(frozen=True)
class Grid:
    """A table as text: its titles, a row for each method, a caption, and a name for references in LaTeX."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    name: str = ""

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=self.caption, caption_justify="left")
        table.add_column(self.titles[0], overflow="fold")
        for title in self.titles[1:]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    @property
    def width(self) -> int:
        """The characters of a line in a terminal."""
        return sum(max(map(len, column)) + 3 for column in zip(self.titles, *self.rows, strict=True))

    def markdown(self) -> str:
        """For a document."""
        rule = ["---", *["---:"] * (len(self.titles) - 1)]
        rows = ([cell.replace("|", "\\|") for cell in cells] for cells in (self.titles, rule, *self.rows))
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        return "\n".join([*lines, "", self.caption.replace("\n", " ")])

    def __str__(self) -> str:
        return self.markdown()

    def _repr_markdown_(self) -> str:
        """For a notebook."""
        return self.markdown()

    def latex(self) -> str:
        """For a paper: a table of the package booktabs. Columns that do not fit beside each other go below."""
        parts = "\n\n\\medskip\n".join(map(self._tabular, self._fitting()))
        caption = rf"\caption{{{_escaped(self.caption)}}}"
        label = [rf"\label{{tab:{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}}}"] if self.name else []
        return "\n".join([r"\begin{table}", r"\centering", parts, caption, *label, r"\end{table}"])

    def _fitting(self) -> list[list[int]]:
        """The numbers of the columns beside each other, each time after the first column."""
        widths = [max(map(len, column)) + 2 for column in zip(self.titles, *self.rows, strict=True)]
        groups: list[list[int]] = [[]]
        for column, width in enumerate(widths[1:], 1):
            if groups[-1] and widths[0] + sum(widths[each] for each in groups[-1]) + width > LINE:
                groups.append([])
            groups[-1].append(column)
        return groups

    def _tabular(self, columns: Sequence[int]) -> str:
        picked = ([cells[0], *(cells[column] for column in columns)] for cells in (self.titles, *self.rows))
        head, *body = (" & ".join(map(_escaped, cells)) + r" \\" for cells in picked)
        begin = rf"\begin{{tabular}}{{l{'r' * len(columns)}}}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def _escaped(text: str) -> str:
    text = re.sub(r"(?<!\w)-(?=\d)", "−", text.replace("\n", " "))  # a minus, no hyphen
    return "".join(_LATEX.get(sign, sign) for sign in text)
