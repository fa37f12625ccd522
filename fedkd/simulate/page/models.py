"""Sections of the page on the models of the clients: their ensemble, the teacher, and each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fedkd.core.report.text import percent, spread
from fedkd.simulate.page import charts, html
from fedkd.simulate.page.results import LONGEST, Choice, drawn, methods, over, titled

if TYPE_CHECKING:
    from fedkd.core.report.rows import Row
    from fedkd.simulate.page.html import Html
    from fedkd.simulate.page.reading import Setting

#: Keys of a row on the quality of the teacher besides those that begin with ``teacher_``.
_AGREEMENT = ("agreement", "student_agreement")
_SHARES = ("accuracy", "agreement", "ece", "coverage")
_NAMES = {"ece": "calibration error (ECE)", "nll": "NLL (nats)", "entropy": "entropy (nats)"}


def teachers(settings: Sequence[Setting], choice: Choice) -> Html:
    """What the rows hold on the ensemble of the clients: after the last evaluated round, and over rounds."""
    parts: list[Html | None] = []
    for setting in settings:
        last = [(run["algorithm"], _last(setting, run, "teacher_accuracy")) for run in setting.runs]
        rows = [(name, row) for name, row in last if row is not None]
        keys = [key for key in dict.fromkeys(key for _, row in rows for key in row) if _is_of_teacher(key, rows)]
        if not keys:
            continue
        lines = []
        for name in dict.fromkeys(name for name, _ in rows):
            mine = [row for each, row in rows if each == name]
            gain = [
                row["teacher_accuracy"] - row["client_accuracy"] for row in mine if row["client_accuracy"] is not None
            ]
            cells = [_cell(key, [row.get(key) for row in mine]) for key in keys]
            cells.insert(1, f"{100 * fmean(gain):+.1f}" if gain else "–")
            lines.append([choice.name(name), *cells])
        titles = [_title(key) for key in keys]
        titles.insert(1, "gain over the mean client")
        note = (
            "Teacher: the ensemble of the participants' models, after the last round in which it was evaluated, on "
            f"{_sample(setting)}; gain: in percentage points, on the same images."
        )
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        parts.append(html.table(titled("Quality of the teacher", setting), ["method", *titles], lines, note))
        curves = over(setting, choice, "rounds", "teacher_accuracy", "Teacher accuracy")
        if curves is not None and max(map(len, setting.curves.values())) > 1:
            parts.append(drawn(setting, choice, [curves]))
    return html.joined(parts)


def _is_of_teacher(key: str, rows: Sequence[tuple[str, Row]]) -> bool:
    is_named = key.startswith("teacher_") or key in _AGREEMENT
    return is_named and any(isinstance(row.get(key), int | float) for _, row in rows)


def _title(key: str) -> str:
    short = key.removeprefix("teacher_")
    return _NAMES.get(short, short.replace("_", " "))


def _cell(key: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    std = stdev(known) if len(known) > 1 else None
    if any(word in key for word in _SHARES):
        return spread(fmean(known), std)
    return f"{fmean(known):.3f}" + ("" if std is None else f" ±{std:.3f}")


def clients(settings: Sequence[Setting], choice: Choice) -> Html:
    """The accuracy of each client's own model: its spread, and a dot for each."""
    return html.joined(part for setting in settings for part in _clients(setting, choice, len(settings) > 1))


def _clients(setting: Setting, choice: Choice, is_titled: bool) -> Iterator[Html]:
    for key, where in (
        ("client_accuracy", _sample(setting)),
        ("local_accuracy", "the local test split of each client"),
    ):
        last = [(run["algorithm"], run["seed"], _last(setting, run, key)) for run in setting.runs]
        rows = [(name, seed, row) for name, seed, row in last if row is not None]
        if not rows:
            continue
        if is_titled and key == "client_accuracy":
            yield html.tag("h3", setting.title)
        keys = [key, f"{key}_worst", f"{key}_p10", f"{key}_std"]
        lines = []
        for name in dict.fromkeys(name for name, *_ in rows):
            mine = [row for each, _, row in rows if each == name]
            mean, *others = ([row.get(each) for row in mine] for each in keys)
            cells = [_cell("accuracy", values) for values in (mean, *others)]
            lines.append([choice.name(name), *cells])
        note = f"Each client's own model on {where}, after the last round in which it was evaluated."
        titles = ["method", "mean", "worst", "10th percentile", "standard deviation over clients"]
        caption = "Accuracy of the clients" if key == "client_accuracy" else "Accuracy on local test splits"
        yield html.table(titled(caption, setting), titles, lines, note)
        yield from _each_client(setting, choice, key.replace("client_", ""), rows, titled(caption, setting))


def _each_client(
    setting: Setting, choice: Choice, key: str, rows: Sequence[tuple[str, int, Row]], caption: str
) -> Iterator[Html]:
    """A dot for each client, and the table of them."""
    groups: dict[str, list[float]] = {}
    table_: dict[tuple[int, int], dict[str, str]] = {}
    samples: dict[tuple[int, int], str] = {}
    for name, seed, row in rows:
        for client in row.get("clients") or ():
            if client.get(key) is not None:
                groups.setdefault(name, []).append(100 * client[key])
                place = seed, client["client"]
                table_.setdefault(place, {})[name] = percent(client[key])
                samples[place] = f"{client['samples']:,}"
    if not groups:
        return
    spans = [f"{choice.name(name)} {min(each):.1f}% to {max(each):.1f}%" for name, each in groups.items()]
    about = f"Accuracy of each client: {', '.join(spans)}."
    colors = methods(setting)
    dots = charts.dots(about, [(choice.name(name), colors.index(name), each) for name, each in groups.items()])
    seeds = len({seed for seed, _ in table_})
    each = "a dot is a client" + " with one of the seeds" * (seeds > 1) + "; the line is their mean"
    yield html.tag("figure", html.tag("figcaption", f"{caption}: {each}"), dots)
    if len(table_) <= LONGEST:
        lines = [
            [f"client {client}" + f", seed {seed}" * (seeds > 1), samples[seed, client]]
            + [found.get(name, "–") for name in groups]
            for (seed, client), found in sorted(table_.items())
        ]
        titles = ["client", "training samples", *map(choice.name, groups)]
        yield html.details("Numbers of the figure", html.table(f"{caption}, each client", titles, lines))


def _last(setting: Setting, run: Mapping[str, Any], key: str) -> Row | None:
    """The last row of a method and seed that has a number."""
    rows = setting.curves.get((run["algorithm"], run["seed"]), ())
    return next((row for row in reversed(rows) if row.get(key) is not None), None)


def _sample(setting: Setting) -> str:
    """The images on which clients and teacher are evaluated."""
    run = next((run for run in setting.runs if run.get("client_test_samples")), None)
    if run is None:
        return "the sample of the test set"
    sample, whole = run["client_test_samples"], run["test_samples"]
    return f"{sample:,} of the {whole:,} test images" if sample < whole else f"all {whole:,} test images"
