"""Figures as SVG whose colors are those of the page, light or dark.

Every figure is 420 units wide: on a phone its text is still large enough to be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.core.report.text import size
from fedkd.simulate.page.html import Html, joined, tag
from fedkd.simulate.page.style import COLORS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDTH = 420
LEFT, RIGHT, TOP = 46, 14, 12
MARKERS = 14  # on a curve, at most
LEVELS = 8  # shades of a picture
DOT = 3.5  # radius
LETTER = 8  # the width of a letter, about
MANY = 200  # dots in a row, from which on they are small
#: Paths around the point (0, 0) that are told from each other without color.
_SHAPES = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.2L4.2 3.2H-4.2z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.2L4.2-3.2H-4.2z",
)


@dataclass(frozen=True)
class Curve:
    """A curve with the standard deviation at each point, in percent; ``index`` gives its color, shape and dashes."""

    index: int
    x: Sequence[float]
    y: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to places, with the values of its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def lines(about: str, curves: Sequence[Curve], span: tuple[float, float], axis: str, *, is_log: bool = False) -> Html:
    """Curves in percent over rounds, or over megabytes with ``is_log``.

    ``about`` is read to who does not see them, ``span`` is the range of the values that must fit.
    """
    height, bottom = 270, 226
    places = [x for curve in curves for x in curve.x]
    y = _linear(max(0.0, span[0]), min(100.0, span[1]), bottom, TOP, least=2.0)
    x = _logarithmic(min(places), max(places)) if is_log else _rounds(min(places), max(places))
    shown = [_curve(curve, x, y) for curve in curves]
    texts = _apart([(x(tick), size(1e6 * tick) if is_log else f"{tick:g}") for tick in x.ticks])
    axes = [_rows(y), *(_text(place, bottom + 17, label, "middle") for place, label in texts)]
    axes.append(tag("path", d=f"M{LEFT} {bottom}H{WIDTH - RIGHT}", class_="axis"))
    axes.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, axis, "middle"))
    return _svg(about, height, [*axes, *shown])


def legend(names: Sequence[str]) -> Html:
    """The line and the shape of each method, beside its name."""
    items = []
    for index, name in enumerate(names):
        line = tag("path", d="M1 6H27", class_=f"curve {_stroke(index)}")
        drawn = tag("svg", line, _marker(index, 14, 6), viewBox="0 0 28 12", aria_hidden="true")
        items.append(tag("li", drawn, tag("span", name)))
    return tag("ul", *items, class_="legend")


def dots(about: str, groups: Sequence[tuple[str, int, Sequence[float]]]) -> Html:
    """A row for each group (name, index of its color, values in percent): a dot for each value, a line at the mean."""
    each, top = 62, TOP + 4
    bottom = top + each * len(groups)
    known = [value for *_, values in groups for value in values]
    x = _linear(max(0.0, min(known)), min(100.0, max(known)), 20, WIDTH - 20, least=5.0)
    shown = [_text(x(tick), bottom + 17, f"{tick:g}%", "middle") for tick in x.ticks]
    for row, (name, index, values) in enumerate(groups):
        middle = top + each * row + 38
        shown.append(_text(4, middle - 22, _cut(name), "start", "name"))
        shown += [tag("path", d=f"M{x(tick)} {middle - 17}V{middle + 17}", class_="grid") for tick in x.ticks]
        radius = DOT if len(values) <= MANY else DOT / 3
        circles = [tag("circle", cx=cx, cy=cy, r=radius) for cx, cy in _swarm([x(value) for value in values], middle)]
        shown.append(tag("g", *circles, class_=f"dot f{index % COLORS}"))
        mean = x(sum(values) / len(values))
        shown.append(tag("path", d=f"M{mean} {middle - 15}V{middle + 15}", class_=f"curve c{index % COLORS}"))
    return _svg(about, bottom + 28, shown)


def picture(about: str, counts: NDArray[np.int64]) -> Html:
    """The samples of each client and class [clients, classes], the more the stronger in color; bars for their sums."""
    clients, classes = counts.shape
    step = max(4.0, min(18.0, 400 / clients))
    width, top = 264 / classes, 30
    bottom = top + step * clients
    most, sizes = int(counts.max()), counts.sum(1)
    paths: dict[int, list[str]] = {}
    for client, label in zip(*counts.nonzero(), strict=True):
        level = math.ceil(LEVELS * counts[client, label] / most)
        paths.setdefault(level, []).append(
            f"M{LEFT + width * label:.1f} {top + step * client:.1f}h{width:.1f}v{step:.1f}h-{width:.1f}z"
        )
    shown = [tag("path", d="".join(each), class_="cell", fill_opacity=level / LEVELS) for level, each in paths.items()]
    bars = "".join(
        f"M330 {top + step * (i + 0.1):.1f}h{max(1.0, 76 * count / sizes.max()):.1f}v{step * 0.8:.1f}H330z"
        for i, count in enumerate(sizes.tolist())
    )
    shown.append(tag("path", d=bars, class_="size"))
    right, end = LEFT + 264, f"{bottom:.1f}"
    shown.append(tag("path", d=f"M{LEFT} {top}H{right}V{end}H{LEFT}z", class_="axis", fill="none"))
    for client in range(0, clients, _every(clients, 400 / 15)):
        shown.append(_text(LEFT - 6, top + step * (client + 0.5) + 4, str(client), "end"))
    for label in range(0, classes, _every(classes, 264 / 22)):
        shown.append(_text(LEFT + width * (label + 0.5), bottom + 16, str(label), "middle"))
    shown += [_text(0, 18, "clients", "start"), _text(right, bottom + 34, "classes", "end")]
    shown.append(_text(WIDTH - RIGHT, 18, f"samples, up to {sizes.max():,}", "end"))
    return _svg(about, bottom + 42, shown)


def _svg(about: str, height: float, shown: Iterable[str]) -> Html:
    return tag("svg", *shown, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=about)


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Html:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def _cut(name: str, most: int = 52) -> str:
    """A name that fits into the width of a figure."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _stroke(index: int) -> str:
    """The classes of a curve: its color; and from the eighth method on its dashes."""
    dashes = index // COLORS % 4
    return f"c{index % COLORS}" + f" d{dashes}" * bool(dashes)


def _marker(index: int, x: float, y: float) -> Html:
    shape = _SHAPES[index % len(_SHAPES)]
    return tag("path", d=shape, class_=f"f{index % COLORS}", transform=f"translate({x:g} {y:g})")


def _apart(texts: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Labels and their places, without those that would touch the one before."""
    kept: list[tuple[float, str]] = []
    for place, label in texts:
        if not kept or place - kept[-1][0] > LETTER * (len(label) + len(kept[-1][1]) + 2) / 2:
            kept.append((place, label))
    return kept


def _curve(curve: Curve, x: Scale, y: Scale) -> Html:
    places, heights = [x(each) for each in curve.x], [y(each) for each in curve.y]
    points = list(zip(places, heights, strict=True))
    band = None
    if any(curve.std):
        edges = [
            [min(100.0, max(0.0, v + sign * s)) for v, s in zip(curve.y, curve.std, strict=True)] for sign in (-1, 1)
        ]
        low, high = (list(zip(places, map(y, edge), strict=True)) for edge in edges)
        band = tag("path", d=f"{_path([*high, *reversed(low)])}z", class_=f"band f{curve.index % COLORS}")
    every = math.ceil(len(points) / MARKERS)
    marked = points[::-every][::-1]  # the last one always
    line = tag("path", d=_path(points), class_=f"curve {_stroke(curve.index)}")
    return tag("g", band, line, *(_marker(curve.index, *point) for point in marked))


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _rows(y: Scale) -> Html:
    """Horizontal lines with their values in percent."""
    lines = [tag("path", d=f"M{LEFT} {y(tick)}H{WIDTH - RIGHT}", class_="grid") for tick in y.ticks]
    return joined([*lines, *(_text(LEFT - 6, y(tick) + 4, f"{tick:g}%", "end") for tick in y.ticks)])


def _linear(low: float, high: float, start: float, end: float, *, least: float) -> Scale:
    """A scale whose ends are ticks, at least ``least`` apart."""
    if high - low < least:
        low, high = max(0.0, (low + high - least) / 2), (low + high + least) / 2
    step = _step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(step * number, 6) for number in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def _rounds(low: float, high: float) -> Scale:
    """A scale from the first round to the last one, with whole numbers as ticks."""
    step = max(1, int(_step((high - low) / 6)))
    inner = [number for number in range(0, int(high) + 1, step) if number > low]
    ticks = [low, *(number for number in inner if high - number >= step / 2), high] if high > low else [low]
    return Scale(low - 0.5 * (high == low), high + 0.5 * (high == low), LEFT + 8, WIDTH - RIGHT - 8, ticks)


def _logarithmic(low: float, high: float) -> Scale:
    """A scale of megabytes, with ticks at 1, 2 and 5 times powers of ten, or at powers only if there are many."""
    low, high = low / 1.15, high * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 6:
            break
    every = max(1, math.ceil(len(ticks) / 6))  # there may be none
    return Scale(low, high, LEFT + 8, WIDTH - RIGHT - 8, ticks[::every] or [math.sqrt(low * high)], is_log=True)


def _step(about: float) -> float:
    """The next larger one of 1, 2, 5, 10, 20, 50, ... or a fraction of these."""
    power = 10.0 ** math.floor(math.log10(about)) if about > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= about - 1e-9)


def _every(count: int, most: float) -> int:
    """How many numbers to go on so that at most so many labels are written."""
    return max(1, int(_step(count / most)))


def _swarm(places: Sequence[float], middle: float) -> list[tuple[float, float]]:
    """Points that are moved up and down so that those near each other do not overlap, as far as there is room."""
    bins: dict[int, list[float]] = {}
    for place in sorted(places):
        bins.setdefault(int(place // (2 * DOT)), []).append(place)
    most = max(map(len, bins.values()))
    gap = min(2 * DOT, 26 / max(1, most - 1))
    return [
        (place, round(middle + gap * (number - (len(each) - 1) / 2), 1))
        for each in bins.values()
        for number, place in enumerate(each)
    ]
