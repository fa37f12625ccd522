"""``report.html``: a run, or a comparison of runs, as one page that needs neither a network nor a script.

Its text follows from the files of the run directory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedkd
from fedkd.core import run_directory
from fedkd.core.notes import plain, say
from fedkd.core.report import figure
from fedkd.simulate.page import about, html, models, results
from fedkd.simulate.page.reading import Setting, record, summaries
from fedkd.simulate.page.results import Choice
from fedkd.simulate.page.style import CSS

if TYPE_CHECKING:
    from fedkd.core.report.table import Curves
    from fedkd.simulate.page.html import Html

FILE = "report.html"
#: Nothing is loaded, and no script is run, whatever stands in the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_run(out: Path, result: Mapping[str, Any], curves: Curves) -> None:
    """Write the page of a run from its result, its rounds, and the other files of its directory."""

    def page() -> str:
        known = {key: rows for key, rows in curves.items() if rows}
        finished = [run for run in result["runs"] if (run["algorithm"], run["seed"]) in known]
        return run_page(Setting("", summaries(finished, known), known, [record(out, result)]))

    _write(out, page)


def write_comparison(out: Path, settings: Callable[[], Sequence[Setting]], choice: Choice) -> None:
    """Write the page of a comparison into its directory. ``settings`` reads files of the runs, which may be damaged."""
    _write(out, lambda: comparison_page(settings(), choice, out))


def _write(out: Path, page: Callable[[], str]) -> None:
    """Write a page, if that is possible: what goes wrong is a line on standard error, and fails no run."""
    try:
        run_directory.write(out / FILE, page())
    except Exception as error:  # a full disk, or a file of a run that is damaged or of another version
        say(f"{out / FILE} is not written ({type(error).__name__}: {error}).")


def run_page(setting: Setting) -> str:
    """The page of a run."""
    (found,) = setting.records
    names = results.methods(setting) or [str(found.config.get("algorithm", "run"))]
    dataset = found.result.get("dataset", "")
    title = f"{_listed(names)} on {dataset}" if dataset else _listed(names)
    return _document(title, [setting], Choice(), found.path, sections=[])


def comparison_page(settings: Sequence[Setting], choice: Choice, out: Path) -> str:
    """The page of a comparison of runs; ``out`` is its directory, which paths and links start from."""
    names = list(dict.fromkeys(choice.name(name) for setting in settings for name in results.methods(setting)))
    title = f"Comparison of {_listed(names)}" + f" in {plain(len(settings), 'setting')}" * (len(settings) > 1)
    compared = html.section("Runs", about.runs(settings, out))
    return _document(title, settings, choice, out, sections=[compared])


def _document(
    title: str,
    settings: Sequence[Setting],
    choice: Choice,
    directory: Path,
    sections: Sequence[tuple[str, Html] | None],
) -> str:
    """A whole page; ``sections`` come before the one on the environment."""
    records = [record for setting in settings for record in setting.records]
    begun = [setting for setting in settings if setting.runs]
    all_sections = [
        html.section("Warnings", about.warnings(settings, choice)),
        html.section("Results", results.summary(begun, choice)),
        html.section("Learning curves", results.curves(begun, choice)),
        html.section("Partition", about.partitions(settings)),
        html.section("Teacher", models.teachers(begun, choice)),
        html.section("Clients", models.clients(begun, choice)),
        html.section("Communication", results.sizes(begun, choice)),
        html.section("Failures", results.failures(begun, choice), about.errors(records)),
        html.section("Privacy", about.privacy(begun, choice)),
        html.section("Configuration", about.configuration(records)),
        *sections,
        html.section("Environment", about.environment(records)),
    ]
    present = [each for each in all_sections if each]
    links = [html.tag("li", html.tag("a", name, href=f"#{html.anchor(name)}")) for name, _ in present]
    header = html.tag(
        "header",
        html.tag("h1", title),
        html.tag("p", results.lead(settings, choice), class_="lead"),
        html.tag("p", _about(settings)),
        *about.alerts(records, directory),
        html.tag("nav", html.tag("ul", *links), aria_label="Sections"),
    )
    made = f"fedkd {fedkd.__version__}. Names of keys and files: docs/output-files.md."
    body = html.tag("main", header, *(content for _, content in present), html.tag("footer", made))
    head = html.tag(
        "head",
        html.tag("meta", charset="utf-8"),
        html.tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        html.tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        html.tag("meta", name="color-scheme", content="light dark"),
        html.tag("title", f"fedkd: {title}"),
        html.tag("style", html.Html(CSS)),
    )
    return f"<!doctype html>\n{html.tag('html', head, html.tag('body', body), lang='en')}"


def _about(settings: Sequence[Setting]) -> str:
    """The setting in one line: data, clients, partitioner, model; numbers of seeds and of rounds."""
    found = settings[0].records[0]
    keys = ("dataset", "clients", "partitioner", "model")
    options = {**found.config, "dataset": found.result.get("dataset") or found.config.get("dataset")}
    parts = [figure.title(options)] if len(settings) == 1 and all(options.get(key) for key in keys) else []
    seeds = {seed for setting in settings for _, seed in setting.curves}
    rounds = [len(rows) for setting in settings for rows in setting.curves.values()]
    if rounds:
        span = (
            f"{min(rounds)} to {plain(max(rounds), 'round')}"
            if min(rounds) < max(rounds)
            else plain(max(rounds), "round")
        )
        parts += [span, plain(len(seeds), "seed")]
    return ", ".join(parts)


def _listed(names: Sequence[str]) -> str:
    """Names in a title: ``a, b and c``; of many, the first."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} other methods"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
