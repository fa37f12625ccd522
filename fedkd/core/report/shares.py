"""How samples are assigned to clients: a table clients x classes, and its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedkd.core import run_directory
from fedkd.core.report import figure
from fedkd.core.report.grid import Grid

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ROWS = 20  # of a table in a terminal; of more clients it has the first ones, and quantiles
QUANTILES = {"smallest": 0.0, "10%": 0.1, "25%": 0.25, "median": 0.5, "75%": 0.75, "90%": 0.9, "largest": 1.0}
SHADES = " ▁▂▃▄▅▆▇█"
LABELS = 12  # characters of a class name in a picture
MOST_LABELS = 20  # on an axis
SMALLEST_CELL = 0.1  # inches; bubbles of smaller cells are no longer told from each other
WIDTHS = {1: 3.3, 2: 6.9}  # inches of a picture, by columns of a paper


@dataclass(frozen=True, eq=False)
class Shares:
    """The number of samples of each client and class [K, C], the names of classes, and the clients' own ids, if any."""

    counts: NDArray[np.int64]
    classes: Sequence[str]
    ids: Sequence[str] = ()

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The number of samples of each client [K]."""
        sizes: NDArray[np.int64] = self.counts.sum(1)
        return sizes

    def client(self, number: int) -> str:
        """A client's number, and its id if it has one."""
        return f"{number} ({self.ids[number]})" if self.ids else str(number)

    def grid(self, caption: str = "") -> Grid:
        """A row for each client, with the number of samples of each class."""
        rows = [
            [self.client(number), f"{self.sizes[number]:,}", *map(str, row)] for number, row in enumerate(self.counts)
        ]
        return Grid(["client", "samples", *self.classes], rows, caption)

    def short(self, width: int) -> Grid:
        """The first clients for a terminal of ``width`` characters: numbers if they fit, otherwise shades."""
        shown = min(len(self.counts), ROWS if len(self.counts) <= ROWS else ROWS // 2)
        head = [[self.client(number), f"{self.sizes[number]:,}"] for number in range(shown)]
        note = f"\nThe first {shown} of {len(self.counts):,} clients." * (shown < len(self.counts))
        numbers = [[f"{count:,}" if count else "·" for count in row] for row in self.counts[:shown]]
        for classes in (list(self.classes), [str(number) for number in range(len(self.classes))]):
            grid = Grid(["client", "samples", *classes], list(map(add, head, numbers)), note.strip())
            if grid.width <= width:
                return grid
        used = [[str(count)] for count in (self.counts[:shown] > 0).sum(1)]
        left = width - Grid(["client", "samples", "of classes", ""], [[*one, "", ""] for one in head], "").width
        text, shades = self._shades(shown, max(left, len("classes")))
        rows = [one + two + three for one, two, three in zip(head, used, shades, strict=True)]
        return Grid(["client", "samples", "of classes", "classes"], rows, f"{text}{note}")

    def _shades(self, shown: int, width: int) -> tuple[str, list[list[str]]]:
        """What a character stands for, and a row of them for each of the first clients."""
        together = -(-len(self.classes) // width)
        starts = np.arange(0, len(self.classes), together)
        sums = np.add.reduceat(self.counts, starts, axis=1)[:shown]
        levels = np.ceil(sums / np.maximum(sums.max(1, keepdims=True), 1) * (len(SHADES) - 1)).astype(int)
        each = "class, in order" if together == 1 else f"{together} classes, in order"
        text = f"A character for each {each}; its height is relative to the client's largest."
        return text, [["".join(SHADES[level] for level in row)] for row in levels]

    def quantiles(self, distances: NDArray[np.float64]) -> Grid:
        """How clients differ in their number of samples and of classes, and in their label distributions."""
        used = (self.counts > 0).sum(1)
        rows = [
            [name, f"{sizes:,.0f}", f"{classes:,.0f}", f"{distance:.2f}"]
            for name, sizes, classes, distance in zip(
                QUANTILES,
                *(np.quantile(each, list(QUANTILES.values())) for each in (self.sizes, used, distances)),
                strict=True,
            )
        ]
        titles = ["of all clients", "samples", "of classes", "distance"]
        return Grid(titles, rows, "distance: total-variation distance to the global label distribution")

    def csv(self) -> str:
        """A line for each client, after a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        named = ["id"] if self.ids else []
        writer.writerow(["client", *named, "samples", *self.classes])
        for number, row in enumerate(self.counts.tolist()):
            writer.writerow([number, *([self.ids[number]] if self.ids else []), sum(row), *row])
        return text.getvalue()

    def draw(self, path: Path, title: str, columns: Literal[1, 2] = 1) -> None:
        """Write a picture of clients x classes: bubbles if they can be told apart, otherwise a heat map.

        Its format is by the suffix of ``path``; it is as wide as one or two columns of a paper.
        """
        clients, classes = self.counts.shape
        width = WIDTHS[columns]
        are_bubbles = (width - 1) / clients >= SMALLEST_CELL and classes <= MOST_LABELS
        height = min(0.9 + 0.16 * classes, 3.2 if columns == 1 else 4.4)
        with figure.sized((width, height)) as drawn:
            axes = drawn.subplots()
            (self._bubbles if are_bubbles else self._heat_map)(drawn, axes)
            self._label(axes)
            axes.set_title(title, fontsize=7, loc="left")
            with run_directory.atomic(path) as part:
                drawn.savefig(part, dpi=300, metadata=figure.WITHOUT_DATE[path.suffix[1:]])

    def _bubbles(self, drawn: Figure, axes: Axes) -> None:
        """A bubble for each client and class, whose area is the number of samples."""
        clients, classes = self.counts.shape
        width, height = drawn.get_size_inches()
        cell = 72 * min((width - 1.1) / clients, (height - 0.7) / classes)  # points
        numbers, labels = self.counts.nonzero()
        largest = self.counts.max()
        areas = (1.2 * cell) ** 2 * self.counts[numbers, labels] / largest
        axes.scatter(numbers, labels, s=areas, color=figure.COLORS[0], linewidths=0)
        axes.set_xlim(-0.6, clients - 0.4)
        axes.set_ylim(-0.6, classes - 0.4)
        axes.set_xlabel(f"client (largest bubble: {largest:,} samples)")

    def _heat_map(self, drawn: Figure, axes: Axes) -> None:
        """The number of samples as a color; small numbers are spread, since many shares are small."""
        from matplotlib.colors import PowerNorm

        norm = PowerNorm(0.5, vmin=0, vmax=self.counts.max())
        image = axes.imshow(self.counts.T, aspect="auto", origin="lower", cmap="Blues", norm=norm)
        bar = drawn.colorbar(image, ax=axes, pad=0.02, aspect=30)
        bar.set_label("samples", fontsize=7)
        bar.ax.tick_params(labelsize=6)

    def _label(self, axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.tick_params(labelsize=6, length=2)
        axes.set_xlabel(axes.get_xlabel() or "client", fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel("class", fontsize=7)
        if len(self.classes) <= MOST_LABELS:
            names = [name if len(name) <= LABELS else f"{name[: LABELS - 1]}…" for name in self.classes]
            axes.set_yticks(range(len(names)), names)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
