"""Sections of the page on results: methods side by side, curves, teachers, clients, bytes, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fedkd.core.notes import plain
from fedkd.core.report import figure, table
from fedkd.core.report.text import size, spread
from fedkd.simulate.page import charts, html

if TYPE_CHECKING:
    from fedkd.core.report.grid import Grid
    from fedkd.core.report.rows import Row
    from fedkd.simulate.page.html import Html
    from fedkd.simulate.page.reading import Setting

LONGEST = 200  # rows of a table of numbers
REASONS = 20
BANDS = 6  # methods in a figure whose standard deviations are drawn
LISTED = 4  # settings in a sentence
LAST = "after the last round"


@dataclass(frozen=True)
class Choice:
    """What the tables show, as the options of fedkd.compare."""

    metric: str = "test_accuracy"
    target: float | None = None
    labels: table.Labels = field(default_factory=dict)
    largest: bool = False

    def name(self, algorithm: str) -> str:
        """The name of a method in tables and figures."""
        return self.labels.get(algorithm, algorithm)


def methods(setting: Setting) -> list[str]:
    """The methods of a setting that have a round, in order."""
    return list(dict.fromkeys(run["algorithm"] for run in setting.runs))


def lead(settings: Sequence[Setting], choice: Choice) -> str:
    """The result in one sentence."""
    ranked = [(setting.title, _ranked(setting)) for setting in settings]
    if not any(found for _, found in ranked):
        return "No method has a test accuracy yet."
    if len(settings) > 1:
        best = [f"{choice.name(found[0][1])}, {found[0][2]}, with {title}" for title, found in ranked if found]
        rest = f"; and {plain(len(best) - LISTED, 'other setting')}" * (len(best) > LISTED)
        return f"The method with the highest test accuracy {LAST}: {'; '.join(best[:LISTED])}{rest}."
    (_, name, accuracy, sent), *others = ranked[0][1]
    first = f"{choice.name(name)} has {'the highest' if others else 'a'} test accuracy {LAST}: {accuracy}, {sent}"
    if not others:
        return f"{first}."
    _, name, accuracy, sent = others[0]
    return f"{first}; next is {choice.name(name)}: {accuracy}, {sent}."


def _ranked(setting: Setting) -> list[tuple[float, str, str, str]]:
    """The methods of a setting by their mean test accuracy, with it and their communication as text.

    ``central`` is an upper bound and no method of federated learning, so it counts only where it is alone.
    """
    found = []
    for name in [name for name in methods(setting) if name != "central"] or methods(setting):
        mine = [run for run in setting.runs if run["algorithm"] == name]
        known = [run["test_accuracy"] for run in mine if run["test_accuracy"] is not None]
        if known:
            accuracy = spread(fmean(known), stdev(known) if len(known) > 1 else None)
            seeds = f" (mean over {plain(len(known), 'seed')})" * (len(known) > 1)
            found.append((fmean(known), name, accuracy + seeds, _sent(mine)))
    return sorted(found, key=lambda each: -each[0])


def _sent(runs: Sequence[Row]) -> str:
    sent = fmean(run["uplink_serialized_bytes"] + run["downlink_serialized_bytes"] for run in runs)
    return (
        f"with {size(sent)} of communication" + " for each seed" * (len(runs) > 1) if sent else "with no communication"
    )


def summary(settings: Sequence[Setting], choice: Choice) -> Html:
    """The tables that the terminal shows, of all settings and of each."""
    parts: list[Html | None] = []
    if len(settings) > 1:
        runs = {setting.title: setting.runs for setting in settings}
        parts.append(_grid("All settings", table.pivot(runs, choice.metric, choice.labels)))
    for setting in settings:
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        grid = table.side_by_side(setting.runs, setting.curves, choice.labels)
        parts.append(_grid(titled("Methods side by side", setting), grid))
        if cost := table.costs(setting.curves, choice.target, choice.labels):
            parts.append(_grid(titled("Cost until a test accuracy", setting), cost))
        if choice.largest:
            grid = table.largest(setting.curves, choice.labels)
            parts.append(_grid(titled("Largest test accuracy", setting), grid))
    return html.joined(parts)


def curves(settings: Sequence[Setting], choice: Choice) -> Html:
    """Test accuracy over rounds and over bytes, with a legend, and the numbers of both."""
    parts: list[Html | None] = []
    for setting in settings:
        panels = [over(setting, choice, "rounds"), over(setting, choice, "bytes")]
        if not any(panels):
            continue
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        parts.append(drawn(setting, choice, panels))
        if len(setting.curves) > len(methods(setting)):
            bands = "; bands: standard deviation" * (len(methods(setting)) <= BANDS)
            parts.append(html.tag("p", f"Lines: means over seeds{bands}.", class_="note"))
        parts.append(_numbers(setting, choice))
    return html.joined(parts)


def over(
    setting: Setting, choice: Choice, panel: figure.Panel, metric: str = "test_accuracy", name: str = "Test accuracy"
) -> Html | None:
    """A figure of a number over rounds or bytes; None if no round has it."""
    found, ends = [], []
    names = methods(setting)
    heights: list[float] = []  # of all methods, so that figures side by side have one scale
    for index, method in enumerate(names):
        x, y, std = figure.means(_rows(setting, method), panel, metric)
        std = std if len(names) <= BANDS else [0.0] * len(std)
        heights += [v + sign * s for v, s in zip(y, std, strict=True) for sign in (-1, 1)]
        if panel == "bytes" and not any(x):
            continue  # nothing is sent
        if x:
            found.append(charts.Curve(index, x, y, std))
            ends.append(f"{choice.name(method)} {y[0]:.1f}% to {y[-1]:.1f}%")
    if not found:
        return None
    title = f"{name} over {panel}"
    about = f"{title}, first to last evaluated round: {', '.join(ends)}."
    axis = {"rounds": "round", "bytes": "bytes, both directions, logarithmic"}[panel]
    svg = charts.lines(about, found, (min(heights), max(heights)), axis, is_log=panel == "bytes")
    return html.tag("figure", html.tag("figcaption", title), svg)


def drawn(setting: Setting, choice: Choice, figures: Sequence[Html | None]) -> Html:
    """Figures side by side, with one legend."""
    names = charts.legend([choice.name(name) for name in methods(setting)])
    return html.tag("div", html.tag("div", *figures, class_="figures"), names, class_="drawn")


def _numbers(setting: Setting, choice: Choice) -> Html | None:
    """The table of the figure over rounds."""
    names = methods(setting)
    by_round: dict[int, dict[str, str]] = {}
    for name in names:
        x, y, std = figure.means(_rows(setting, name), "rounds", "test_accuracy")
        has_seeds = len(_rows(setting, name)) > 1
        for number, mean, each in zip(x, y, std, strict=True):
            by_round.setdefault(int(number), {})[name] = spread(mean / 100, each / 100 if has_seeds else None)
    if len(by_round) > LONGEST:
        return html.tag("p", "The numbers of each round are in rounds.jsonl.", class_="note")
    rows = [[str(number), *(each.get(name, "–") for name in names)] for number, each in sorted(by_round.items())]
    titles = ["round", *map(choice.name, names)]
    return html.details("Numbers of the figure", html.table(titled("Test accuracy by round", setting), titles, rows))


def sizes(settings: Sequence[Setting], choice: Choice) -> Html:
    """Bytes of both directions in all, and of each direction."""
    parts: list[Html | None] = []
    for setting in settings:
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        grid = table.ledger(setting.runs, choice.labels)
        parts.append(_grid(titled("Bytes of both directions", setting), grid))
        kinds = ("float32", "entropy_bound", "encoded", "serialized", "metadata")
        lines = []
        for name in methods(setting):
            runs = _rows(setting, name)
            for way in ("uplink", "downlink"):
                totals = [fmean(sum(row[f"{way}_{kind}_bytes"] for row in rows) for rows in runs) for kind in kinds]
                lines.append([f"{choice.name(name)}, {way}", *map(size, totals)])
            evaluation = fmean(sum(row["evaluation_bytes"] for row in rows) for rows in runs)
            lines.append([f"{choice.name(name)}, evaluation", *["–"] * 3, size(evaluation), "–"])
        titles = ["method", *(kind.replace("_", " ") for kind in kinds)]
        note = (
            "All clients and rounds, mean over seeds. Uplink as float32, entropy bound and encoded: only of updates "
            "that the server accepted. Evaluation is not part of a method and not counted in any other number."
        )
        parts.append(html.table(titled("Bytes of each direction", setting), titles, lines, note))
    return html.joined(parts)


def failures(settings: Sequence[Setting], choice: Choice) -> Html:
    """Missing and refused updates, their reasons, excluded clients, and clients that were not evaluated."""
    parts: list[Html | None] = []
    for setting in settings:
        grid = table.failures(setting.curves)
        found: Counter[tuple[str, ...]] = Counter()
        for (name, _), rows in setting.curves.items():
            for row in rows:
                for kind, key in (("update", "failures"), ("evaluation", "evaluation_failures")):
                    found.update(
                        (choice.name(name), kind, each["cause"], each["reason"]) for each in row.get(key) or ()
                    )
        gone = [(choice.name(run["algorithm"]), run["seed"], run.get("excluded")) for run in setting.runs]
        excluded = [f"{name}, seed {seed}: {', '.join(map(str, those))}" for name, seed, those in gone if those]
        if not found and not excluded:
            continue
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        if grid:
            missing = [[choice.name(row[0]), *row[1:]] for row in grid.rows]
            parts.append(html.table(titled("Missing updates", setting), grid.titles, missing, grid.caption))
        lines = [[*key, str(count)] for key, count in found.most_common(REASONS)]
        rest = f"The {REASONS} most frequent ones." * (len(found) > REASONS)
        titles = ["method", "of", "cause", "reason", "count"]
        parts.append(html.table(titled("Reasons", setting), titles, lines, rest, texts=True) if lines else None)
        parts.append(html.tag("p", f"Excluded at the end: {'; '.join(excluded)}.") if excluded else None)
    return html.joined(parts)


def _grid(caption: str, grid: Grid) -> Html:
    return html.table(caption, grid.titles, grid.rows, grid.caption)


def titled(caption: str, setting: Setting) -> str:
    """A caption, with the setting if there are several."""
    return f"{caption}: {setting.title}" if setting.title else caption


def _rows(setting: Setting, name: str) -> list[Sequence[Row]]:
    return [rows for (algorithm, _), rows in setting.curves.items() if algorithm == name]
