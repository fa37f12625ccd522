"""Sections of the page on what was run: data, options, machine, privacy, warnings."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fedkd.core.config import Config
from fedkd.core.errors import last_line
from fedkd.core.notes import plain
from fedkd.data import skew
from fedkd.simulate.page import charts, html
from fedkd.simulate.page.results import methods
from fedkd.simulate.page.uploads import upload

if TYPE_CHECKING:
    from fedkd.simulate.page.html import Html
    from fedkd.simulate.page.reading import Counts, Record, Setting
    from fedkd.simulate.page.results import Choice

PICTURED = 100  # clients in a picture
TABLED = 30  # classes in a table
TRACEBACKS = 10
#: Options that say where output is, not what was run.
_OUTPUT = {"out", "resume", "json"}


def alerts(records: Sequence[Record], directory: Path) -> list[Html]:
    """What a reader must know before the numbers: what did not end well, and on which data it is."""
    found = []
    for record in records:
        result, where = record.result, f"{shown(record.path, directory)}: " * (len(records) > 1)
        status = result.get("status", "not finished")
        if status != "ok":
            why = f" ({result['message']})" if result.get("message") else ""
            text = f"{where}The run is {status}{why}; what follows is as far as it went."
            found.append(html.tag("p", text.replace("run is failed", "run has failed"), class_="alert"))
    for fallback in dict.fromkeys(record.result.get("dataset_fallback") for record in records):
        if fallback:
            text = f"CIFAR-10 is not available, so this is on digits. {fallback}"
            found.append(html.tag("p", text, class_="notice"))
    return found


def warnings(settings: Sequence[Setting], choice: Choice) -> Html:
    """What the runs were warned of."""
    lines = []
    for setting in settings:
        for record in setting.records:
            for each in record.result.get("warnings") or ():
                name = choice.name(each.get("algorithm", "–"))
                where = [str(each[key]) if each.get(key) is not None else "–" for key in ("seed", "round")]
                lines.append([name + f", {setting.title}" * (len(settings) > 1), *where, each["text"]])
    titles = ["method", "seed", "round", "warning"]
    return html.table("Warnings of the runs", titles, lines, texts=True) if lines else html.joined([])


def partitions(settings: Sequence[Setting]) -> Html:
    """How the samples are assigned to clients: measures of the skew for each seed, and a picture of each."""
    parts = []
    for setting in settings:
        found = {seed: (counts, r.names) for r in setting.records for seed, counts in r.counts.items()}
        if not found:
            continue
        lines = []
        for seed, (counts, _) in sorted(found.items()):
            got = skew.of_counts(counts, int(counts.sum()))
            sizes = [f"{value:,}" for value in (got.smallest, got.median, got.largest)]
            lines.append([str(seed), f"{len(counts):,}", *sizes, f"{got.classes:.2f}", f"{got.distance:.3f}"])
        titles = ["seed", "clients", "fewest samples", "median", "most", "effective classes", "distance"]
        note = (
            "Effective classes: the effective number of classes per client, mean of exp(entropy of a client's labels); "
            "distance: mean total-variation distance to the global label distribution, from 0 (all clients are alike)."
        )
        caption = "Skew of the partition" + f": {setting.title}" * bool(setting.title)
        parts += [html.tag("h3", setting.title)] * (len(settings) > 1)
        parts.append(html.table(caption, titles, lines, note))
        drawn = [_picture(seed, each[0]) for seed, each in sorted(found.items())]
        parts.append(html.tag("div", drawn[0], class_="figures"))
        parts.append(_counts(caption, *sorted(found.items())[0]))
        if drawn[1:]:
            others = html.tag("div", *drawn[1:], class_="figures")
            parts.append(html.details(f"The partition with {plain(len(drawn) - 1, 'other seed')}", others))
    return html.joined(parts)


def _picture(seed: int, counts: Counts) -> Html:
    cut = counts[:PICTURED]
    of = f" of {len(counts):,}" * (len(cut) < len(counts))
    sizes, present = cut.sum(1), (cut > 0).sum(1)
    about = (
        f"Samples of {len(cut)} clients{of} in {counts.shape[1]} classes: a client has {sizes.min():,} to "
        f"{sizes.max():,} samples of {present.min()} to {present.max()} classes."
    )
    first = f"the first {len(cut)} of {len(counts):,} clients" if of else "clients"
    caption = f"Samples of each class, {first}, seed {seed}; strongest color: {cut.max():,} samples"
    return html.tag("figure", html.tag("figcaption", caption), charts.picture(about, cut))


def _counts(caption: str, seed: int, found: tuple[Counts, Sequence[str]]) -> Html:
    """The numbers of a picture."""
    counts, names = found
    if counts.shape[1] > TABLED:
        return html.tag("p", f"The numbers are in partition.npz, as seed{seed}_counts.", class_="note")
    titles = [*names, *map(str, range(len(names), counts.shape[1]))]
    titles = [title if title == str(number) else f"{number} {title}" for number, title in enumerate(titles)]
    rows = [[f"client {client}", *map(str, row)] for client, row in enumerate(counts[:PICTURED].tolist())]
    return html.details(
        "Numbers of the figure", html.table(f"{caption}, samples by class, seed {seed}", ["client", *titles], rows)
    )


def privacy(settings: Sequence[Setting], choice: Choice) -> Html:
    """What leaves a client, and what is claimed of it: nothing more than docs/algorithms.md does."""
    names = list(dict.fromkeys(name for setting in settings for name in methods(setting)))
    if not names:
        return html.joined([])
    items = [html.tag("li", html.tag("b", choice.name(name)), f": {upload(name)}.") for name in names]
    parts: list[str] = [
        html.tag("p", "No formal privacy is claimed. What a client uploads in a round:"),
        html.tag("ul", *items),
        html.tag(
            "p",
            "With it the server receives the client's number of samples, the metrics that the method declares, and the "
            "text of an error. For the evaluation, which is not part of a method, a client sends the logits, accuracy "
            "and loss of its model. That only logits are shared is not a guarantee of privacy: soft labels leak a "
            "client's label distribution and can reveal membership.",
        ),
    ]
    if any(record.config.get("save") == "clients" for setting in settings for record in setting.records):
        parts.append(html.tag("p", "At the end the clients' models are sent, too (--save clients)."))
    epsilons = [row["train_metrics"] for s in settings for rows in s.curves.values() for row in rows[-1:]]
    if drawn := [each for each in epsilons if "epsilon" in each and "delta" in each]:
        mean = {key: fmean(each[key] for each in drawn) for key in ("epsilon", "delta")}
        parts.append(
            html.tag(
                "p",
                f"Drawing the training samples once gives (ε, δ) = ({mean['epsilon']:.3g}, {mean['delta']:.3g}) as a "
                "mean over clients. That of a client may be larger, and δ is far above the usual 1 / samples, so this "
                "guarantee means little.",
            )
        )
    return html.joined(parts)


def configuration(records: Sequence[Record]) -> Html:
    """The options: those that differ from the defaults or between runs, then all others."""
    fields = dataclasses.fields(Config)
    defaults = {field.name.replace("_", "-"): _shown(field.default.default) for field in fields}  # type: ignore[union-attr]
    options = _merged([record.config for record in records])
    changed = [key for key, values in options.items() if key not in _OUTPUT and values != [defaults.get(key)]]
    first = [[key, "; ".join(options[key]), defaults.get(key, "–")] for key in changed]
    rest = [[key, "; ".join(values)] for key, values in options.items() if key not in changed]
    parts = []
    if first:
        titles = ["option", "value", "default"]
        parts.append(html.table("Options that differ from the defaults", titles, first, texts=True))
    if rest:
        others = html.table("Options with their default, and where output is", ["option", "value"], rest, texts=True)
        parts.append(html.details("All other options", others))
    return html.joined(parts)


def environment(records: Sequence[Record]) -> Html:
    """Versions, machine and inputs; of several runs all different values."""
    merged = _merged([dict(_flat(record.environment)) for record in records])
    left_out = {"command"} if len(records) > 1 else set()  # each run has its own
    rows = [[key, "; ".join(values)] for key, values in merged.items() if values != ["none"] and key not in left_out]
    caption = "What results may depend on besides the options"
    return html.table(caption, ["key", "value"], rows, texts=True) if rows else html.joined([])


def errors(records: Sequence[Record]) -> Html:
    """The last tracebacks of errors.jsonl, on request."""
    found = [each for record in records for each in record.errors]
    parts = []
    for each in found[-TRACEBACKS:]:
        where = [f"{key} {each[key]}" for key in ("algorithm", "seed", "round", "client") if key in each]
        text = str(each.get("reason") or each.get("details") or each.get("message") or "")
        title = ": ".join(filter(None, [", ".join(where), str(each.get("message") or last_line(text))]))
        parts.append(html.details(title, html.tag("pre", text, tabindex="0")))
    if not parts:
        return html.joined([])
    first = f"The last {len(parts)} of {plain(len(found), 'traceback')} in errors.jsonl:"
    return html.joined([html.tag("h3", "Tracebacks"), html.tag("p", first), *parts])


def runs(settings: Sequence[Setting], directory: Path) -> Html:
    """The runs of a comparison, with links to their own pages."""
    lines = []
    for setting in settings:
        for record in setting.records:
            path, page = shown(record.path, directory), record.path / "report.html"
            cell = html.tag("a", path, href=quote(shown(page, directory))) if page.exists() else path
            methods = " ".join(filter(None, (record.config.get(key) for key in ("algorithm", "compare"))))
            seeds = f"{record.config.get('seed', '–')}" + f", {record.config.get('seeds', 1)} in all" * (
                record.config.get("seeds", 1) > 1
            )
            lines.append([cell, setting.title or "–", methods, seeds, record.result.get("status", "not finished")])
    titles = ["run", "setting", "methods", "first seed", "status"]
    return html.table("Runs that are compared", titles, lines, texts=True)


def shown(path: Path, directory: Path) -> str:
    """A path as seen from the directory of the page."""
    return os.path.relpath(path, directory)


def _merged(tables: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The different values of each key, as text, in order."""
    found: dict[str, dict[str, None]] = {}
    for table in tables:
        for key, value in table.items():
            found.setdefault(key, {})[_shown(value)] = None
    return {key: list(values) for key, values in found.items()}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values, with those of tables inside it."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}: ")
        else:
            yield prefix + key, value


def _shown(value: object) -> str:
    """A value as it is written in a command or in a scenario file."""
    if isinstance(value, list):
        return shlex.join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value not in ("", None) else "none"
