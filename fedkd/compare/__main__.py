"""``python -m fedkd.compare``: separate runs, or the runs of a scenario file, in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from fedkd.compare import reading, sweep
from fedkd.core import cli, run_directory
from fedkd.core.errors import UsageError, unknown
from fedkd.core.notes import say
from fedkd.core.report import figure, grid, students, table
from fedkd.core.report.rows import numbers
from fedkd.core.report.screen import Screen
from fedkd.simulate import page
from fedkd.simulate.page.reading import Setting, record
from fedkd.simulate.page.results import Choice

if TYPE_CHECKING:
    from fedkd.core.report.grid import Grid
    from fedkd.core.report.rows import Row

app = cli.new("compare")
Format = Literal[grid.Format, "csv", "json"]
Groups = Mapping[str, Sequence[reading.RunFiles]]  # title of a setting -> its runs
Settings = Mapping[str, tuple[Sequence["Row"], table.Curves]]  # title -> summaries, and rounds by method and seed


@app.default
def compare(
    *runs: Annotated[Path, Parameter(help="Run directories, of different methods, losses or seeds; or one TOML file.")],
    by: Annotated[
        tuple[str, ...],
        Parameter(
            help="Options in which the runs differ: a column for each setting.", consume_multiple=True, negative=()
        ),
    ] = (),
    metric: Annotated[
        str, Parameter(help="The number in a table of several settings, and in the figure: a key of their rows.")
    ] = "test_accuracy",
    target: Annotated[
        float | None,
        Parameter(help="Rounds, bytes and time until this test accuracy, a fraction.", validator=Number(gt=0, lte=1)),
    ] = None,
    form: Annotated[
        Format,
        Parameter(name="--format", help="terminal, markdown, latex; csv and json: a record for each method and seed."),
    ] = "terminal",
    name: Annotated[
        tuple[str, ...],
        Parameter(
            help="METHOD=NAME, VALUE=NAME: its name in tables and figures, such as 'fedavg=FedAvg (ours)'.",
            consume_multiple=True,
            negative=(),
        ),
    ] = (),
    largest: Annotated[
        bool, Parameter(help="Also the largest test accuracy of all rounds or epochs, as in some papers.", negative=())
    ] = False,
    out: Annotated[
        Path | None,
        Parameter(help="A directory for report.html, curve.png, .svg, .pdf, and for the runs of a scenario file."),
    ] = None,
    panel: Annotated[
        tuple[figure.Panel, ...],
        Parameter(help="Panels of the figure: over rounds, bytes, seconds.", consume_multiple=True, negative=()),
    ] = ("rounds", "bytes"),
    columns: Annotated[
        Literal[0, 1, 2], Parameter(help="Width of the figure in columns of a paper; 0: as wide as a screen.")
    ] = 0,
    style: Annotated[str, Parameter(help="A style of matplotlib for the figure: a file of rcParams, or a name.")] = "",
) -> None:
    """Put methods and seeds of several runs into one table, as if they were one run.

    The runs must have the same options, except for methods, seeds, codecs, the options of the machine (device,
    precision, engine, workers) and those of --by. Runs of fedkd.distill may differ in losses and teachers, and must
    have the same seeds.

    With a scenario file, what has not been run yet is run first: each method and seed, in each combination of the
    values in its [sweep]. What was interrupted is continued.
    """
    if not runs:
        raise UsageError("Give at least one run directory, or a scenario file.")
    labels: Mapping[str, str] = {}
    look = figure.Look(panel, metric, columns, style)
    figure.check(look)
    if any(path.suffix == ".toml" for path in runs):
        if len(runs) > 1 or by:
            raise UsageError("A scenario file stands alone, and its [sweep] says in what its runs differ.")
        planned = sweep.read(runs[0])
        out = out or Path("runs") / runs[0].stem
        _check_folder(out)
        labels = {**planned.labels, **_labels(name, planned.named)}
        reading.titles({reading.values(cell.config.run_config(), planned.by) for cell in planned.cells}, labels)
        runs, by, name = tuple(sweep.run(planned, out)), tuple(planned.by), ()
    _check_folder(out)
    files = [reading.read_run(path) for path in runs]
    if len({one.is_distilled for one in files}) == 2:
        raise UsageError("Name runs of fedkd.simulate or of fedkd.distill, not of both.")
    if files[0].is_distilled:
        if out is not None or by or name or target is not None:
            raise UsageError("--out, --by, --name and --target are for runs of fedkd.simulate.")
        rows = reading.distilled(files)
        records = [{"loss": one.config["loss"], **run} for one in files for run in one.result["runs"]]
        _show([students.side_by_side(rows), *([students.largest(rows)] if largest else [])], records, form)
        return
    found = reading.by_setting(files, by)
    read = [reading.simulated(each) for each in found.values()]
    methods = dict.fromkeys(run["algorithm"] for runs, _ in read for run in runs)
    labels = labels or _labels(name, [*methods, *(value for values in found for value in values)])
    titles = reading.titles(found, labels)
    groups, settings = dict(zip(titles, found.values(), strict=True)), dict(zip(titles, read, strict=True))
    _show(_grids(settings, metric, target, labels, largest), _records(groups, settings, by, target, labels), form)
    if out is not None:
        _draw(groups, settings, by, out, labels, look)

        def shown() -> list[Setting]:
            found = {title: [record(one.path, one.result) for one in each] for title, each in groups.items()}
            return [Setting(title, *settings[title], found[title]) for title in settings]

        page.write_comparison(out, shown, Choice(metric, target, labels, largest))


def _check_folder(out: Path | None) -> None:
    if out is not None and (out / "config.toml").exists():
        raise UsageError(f"--out {out} is a run directory, whose curves would be replaced; name another directory.")


def _labels(texts: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """The names in METHOD=NAME or VALUE=NAME, each for one of ``known``; specs have equal signs, too."""
    labels = {}
    for text in texts:
        found = [each for each in known if text.startswith(f"{each}=") and len(text) > len(each) + 1]
        if not found:
            named, sign, _ = text.rpartition("=")
            if not sign or text in (f"{each}=" for each in known):
                raise UsageError(f"--name {text} cannot be read; write METHOD=NAME, such as 'fedavg=FedAvg (ours)'.")
            raise UsageError(unknown("method or value in --name", named, known))
        longest = max(found, key=len)
        labels[longest] = text.removeprefix(f"{longest}=")
    return labels


def _draw(
    groups: Groups, settings: Settings, by: Sequence[str], out: Path, labels: Mapping[str, str], look: figure.Look
) -> None:
    """A figure for each setting; none of a number that only whole runs have."""
    run_directory.create(out)
    known = numbers(row for _, curves in settings.values() for rows in curves.values() for row in rows)
    if look.metric not in known:
        say(f"no figure is drawn: rounds have no {look.metric}.")
        return
    for number, (title, (_, curves)) in enumerate(settings.items(), 1):
        about = figure.title(groups[title][0].config, by, title)
        file = f"curve-{number}" if len(settings) > 1 else "curve"
        figure.draw(curves, about, out, file, labels, look)


def _grids(
    settings: Settings, metric: str, target: float | None, labels: Mapping[str, str], largest: bool
) -> list[Grid]:
    """The tables of one setting; or, of several, one with a column for each."""
    if len(settings) > 1:
        if metric not in (known := numbers(run for runs, _ in settings.values() for run in runs)):
            raise UsageError(unknown("--metric", metric, known))
        by_title = {title: runs for title, (runs, _) in settings.items()}
        shown = [metric, *(["largest_test_accuracy"] if largest and metric != "largest_test_accuracy" else [])]
        grids: list[Grid | None] = [table.pivot(by_title, each, labels) for each in shown]
        if target is not None:
            grids += [table.costs(curves, target, labels, title) for title, (_, curves) in settings.items()]
        return [each for each in grids if each]
    (runs, curves), *_ = settings.values()
    known = numbers(runs) | numbers(row for rows in curves.values() for row in rows)
    if metric not in known:
        raise UsageError(unknown("--metric", metric, known))
    grids = [table.side_by_side(runs, curves, labels), table.costs(curves, target, labels), table.ledger(runs, labels)]
    grids += [table.largest(curves, labels)] if largest else []
    return [each for each in grids if each]


def _records(
    groups: Groups, settings: Settings, by: Sequence[str], target: float | None, labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A record for each method and seed: its setting, its name, its summary, and what the target took."""
    return [
        {
            **{key: groups[title][0].config[key] for key in by},
            "name": labels.get(run["algorithm"], run["algorithm"]),
            **run,
            **({} if target is None else table.spent(target, curves[run["algorithm"], run["seed"]])),
        }
        for title, (runs, curves) in settings.items()
        for run in runs
    ]


def _show(grids: Sequence[Grid], records: Sequence[Mapping[str, Any]], form: Format) -> None:
    """Print tables, or the records instead."""
    if form == "json":
        print(json.dumps(records, indent=2))
    elif form == "csv":
        flat = [dict(_flat(record)) for record in records]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        print(text.getvalue(), end="")
    else:
        for each in grids:
            Screen(cli.Console()).show(each, form)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys and values with those of nested objects, whose names are joined by dots; lists are left out."""
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            pairs.append((prefix + key, value))
    return pairs


if __name__ == "__main__":
    cli.run(app)
