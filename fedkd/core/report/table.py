"""Tables of several methods side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fedkd.core.report.grid import Grid
from fedkd.core.report.rows import common_accuracy, sent, until
from fedkd.core.report.text import percent, points, seconds, size, spread

if TYPE_CHECKING:
    from fedkd.core.report.rows import Row

Curves = Mapping[tuple[str, int], Sequence["Row"]]  # (algorithm, seed) -> the rows of its rounds
Labels = Mapping[str, str]  # algorithm -> its name in tables and figures, if it has one
NO_LABELS: Labels = {}
BASELINE = "fedavg"
LISTED = 5  # clients in a cell
RESAMPLES = 10_000
CLIENTS = "*: no global student; the test accuracy is the mean of the clients' own models."
UNFINISHED = "†: not finished; after the last round that is there."
INTERVAL = "[95% bootstrap interval of the mean]; with few seeds it is too narrow"


def side_by_side(runs: Sequence[Row], curves: Curves, labels: Labels = NO_LABELS) -> Grid:
    """A row for each method: means over seeds, with the standard deviation where there are several.

    ``labels`` are names for methods, instead of their specs.
    """
    names = list(dict.fromkeys(run["algorithm"] for run in runs))
    is_even = len({sum(run["algorithm"] == name for run in runs) for name in names}) == 1
    is_paired = BASELINE in names and len(names) > 1
    is_validated = any(run.get("best_round") is not None for run in runs)
    is_local = any(run.get("local_accuracy") is not None for run in runs)
    has_lengths = len({len(rows) for rows in curves.values()}) > 1  # some have ended early
    baseline = labels.get(BASELINE, BASELINE)
    titles = ["method", "test acc", *([f"Δ {baseline}"] if is_paired else []), "last 5", "teacher", "clients"]
    titles += ["local", "local p10", "student local"] * is_local
    titles += ["validation", "test at best"] * is_validated + ["rounds"] * has_lengths
    titles += ["uplink", "downlink", "training", "evaluation"]
    rows = []
    for name in names:
        mine = [run for run in runs if run["algorithm"] == name]
        keys = ["test_accuracy", "test_accuracy_last5", "teacher_accuracy", "client_accuracy"]
        keys += ["local_accuracy", "local_accuracy_p10", "student_local_accuracy"] * is_local
        keys += ["best_validation_accuracy", "best_test_accuracy"] * is_validated
        accuracy, *others = (_spread([run.get(key) for run in mine]) for key in keys)
        others += [f"{fmean(len(curves[name, run['seed']]) for run in mine):.1f}".removesuffix(".0")] * has_lengths
        rows.append(
            [
                labels.get(name, name) + _marks(mine) + f" ({_seeds(len(mine))})" * (not is_even),
                accuracy,
                *([_paired(mine, runs)] if is_paired else []),
                *others,
                *(
                    size(fmean(run[key] for run in mine))
                    for key in ("uplink_serialized_bytes", "downlink_serialized_bytes")
                ),
                *(seconds(fmean(run[key] for run in mine)) for key in ("training_seconds", "evaluation_seconds")),
            ]
        )
    caption = [
        "uplink, downlink: serialized bytes of all clients and rounds;",
        "training: of clients and server; evaluation: of clients and student on the test set.",
    ]
    ended = [run for run in runs if not run.get("unfinished")] or [runs[0]]
    sample, whole = (ended[0].get(key) for key in ("client_test_samples", "test_samples"))
    if None not in (sample, whole) and sample != whole:
        caption.append(
            f"teacher, clients: on {sample:,} of the {whole:,} test images, the same for all methods and seeds."
        )
    if is_paired:
        has_interval = any("[" in row[2] for row in rows)
        caption.append(f"Δ {baseline}: difference in percentage points, paired by seed{f' {INTERVAL}' * has_interval}.")
    if is_local:
        caption.append(
            "local, student local: mean accuracy of a client's model, and of the student, on the client's local test "
            "split;\nlocal p10: that of the client at the 10th percentile."
        )
    if is_validated:
        caption.append("validation: the highest validation accuracy; test at best: test accuracy in that round.")
    if any(run["evaluated_model"] == "clients" for run in runs):
        caption.append(CLIENTS)
    if any(None in [row["test_accuracy"] for row in rows] for rows in curves.values()):
        caption.append("–: not evaluated in every round (--evaluate-every).")
    caption += [UNFINISHED] * _unfinished(runs)
    return Grid(titles, rows, "\n".join(caption), "methods")


def costs(curves: Curves, target: float | None = None, labels: Labels = NO_LABELS, setting: str = "") -> Grid | None:
    """Rounds, bytes and training time of each method until its test accuracy first is ``target``.

    Without a target, it is the highest that all methods reached; None if there is none, or only one method.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    accuracy = common_accuracy(list(curves.values())) if target is None and len(names) > 1 else target
    if accuracy is None:
        return None
    lines = []
    for name in names:
        each = [spent(accuracy, rows) for (algorithm, _), rows in curves.items() if algorithm == name]
        reached = [one for one in each if one["rounds_to_target"] is not None]
        cells = ["–"] * 3
        if len(reached) == len(each):
            rounds, sizes, times = (fmean(values) for values in zip(*(one.values() for one in reached), strict=True))
            cells = [f"{rounds:.1f}".removesuffix(".0"), size(sizes), seconds(times)]
        lines.append([labels.get(name, name), f"{len(reached)} of {len(each)}", *cells])
    which = "the highest accuracy that all methods reached" if target is None else "the target"
    caption = f"{setting}: " * bool(setting) + (
        f"Until the test accuracy first is {percent(accuracy)}, {which}; –: not with every seed, or not evaluated."
    )
    return Grid(["method", "seeds", "rounds", "bytes, both directions", "training"], lines, caption, f"costs {setting}")


def spent(target: float, rows: Sequence[Row]) -> Row:
    """Rounds, bytes and training time until the test accuracy first is ``target``; None if it never is."""
    reached = until(target, rows)
    if reached is None:
        return dict.fromkeys(("rounds_to_target", "bytes_to_target", "training_seconds_to_target"))
    return {
        "rounds_to_target": len(reached),
        "bytes_to_target": sent(reached),
        "training_seconds_to_target": sum(row["training_seconds"] for row in reached),
    }


def pivot(settings: Mapping[str, Sequence[Row]], metric: str, labels: Labels = NO_LABELS) -> Grid:
    """A row for each method, a column for each setting: means over seeds of a number of ``result.json``."""
    names = list(dict.fromkeys(run["algorithm"] for runs in settings.values() for run in runs))
    lines = []
    for name in names:
        mine = [[run for run in runs if run["algorithm"] == name] for runs in settings.values()]
        cells = [_number(metric, [run.get(metric) for run in runs]) + "†" * _unfinished(runs) for runs in mine]
        clients = any(run["evaluated_model"] == "clients" for runs in mine for run in runs)
        lines.append([labels.get(name, name) + "*" * clients, *cells])
    counts = {sum(run["algorithm"] == name for run in runs) for runs in settings.values() for name in names}
    how_many = _seeds(max(counts)) if len(counts) == 1 else f"{min(counts)} to {_seeds(max(counts))}"
    caption = [f"{metric.replace('_', ' ')}, {how_many}" + "; ±: standard deviation" * (max(counts) > 1) + "."]
    caption += [CLIENTS] * any(line[0].endswith("*") for line in lines)
    caption += [UNFINISHED] * any(map(_unfinished, settings.values()))
    return Grid(["method", *settings], lines, "\n".join(caption), metric)


def largest(curves: Curves, labels: Labels = NO_LABELS) -> Grid:
    """Test accuracy after the last round, and the largest of all rounds, as some published tables report it."""
    lines = []
    for name in dict.fromkeys(name for name, _ in curves):
        mine = [[row["test_accuracy"] for row in rows] for (algorithm, _), rows in curves.items() if algorithm == name]
        most = [max((value for value in each if value is not None), default=None) for each in mine]
        lines.append([labels.get(name, name), _spread([each[-1] for each in mine]), _spread(most)])
    caption = "largest: of all rounds, chosen on the test set, so it is too high."
    return Grid(["method", "last round", "largest on test"], lines, caption, "largest")


def failures(curves: Curves) -> Grid | None:
    """How often each method lacked updates, by cause, and of which clients; None if never."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for (name, _), rows in curves.items():
        for failure in (failure for row in rows for failure in row["failures"]):
            counts.setdefault((name, failure["cause"]), Counter())[failure["client"]] += 1
    lines = []
    for (name, cause), clients in counts.items():
        most = ", ".join(f"{client} ({count})" for client, count in clients.most_common(LISTED))
        lines.append([name, cause, str(clients.total()), most + ", …" * (len(clients) > LISTED)])
    titles = ["method", "missing updates", "count", "clients (count)"]
    return Grid(titles, lines, "All seeds and rounds; the reasons are in rounds.jsonl.") if lines else None


def ledger(runs: Sequence[Row], labels: Labels = NO_LABELS) -> Grid:
    """The bytes of each method in all: as float32, at the entropy bound, encoded and serialized."""
    rows = []
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        sizes = [fmean(run[key] for run in mine) for key in ("float32_bytes", "entropy_bound_bytes", "encoded_bytes")]
        serialized = fmean(run["uplink_serialized_bytes"] + run["downlink_serialized_bytes"] for run in mine)
        equal = [samples for run in mine if (samples := run.get("break_even_proxy_size")) is not None]
        rows.append(
            [labels.get(name, name), *map(size, sizes), size(serialized), f"{int(fmean(equal)):,}" if equal else "–"]
        )
    caption = (
        "entropy bound: of the symbols one by one, floats as encoded; serialized: with names and headers;\n"
        "break-even: proxy samples per round at which the uplink takes as many bytes as the student's weights."
    )
    return Grid(["method", "float32", "entropy bound", "encoded", "serialized", "break-even"], rows, caption, "bytes")


def _number(metric: str, values: Sequence[float | None]) -> str:
    """The mean of a number of ``result.json``, in its unit; fractions with their standard deviation."""
    known = [value for value in values if value is not None]
    if "accuracy" in metric or not known:
        return _spread(values)
    if metric.endswith("bytes"):
        return size(fmean(known))
    if metric.endswith("seconds"):
        return seconds(fmean(known))
    return f"{fmean(known):.4g}" + (f" ±{stdev(known):.2g}" if len(known) > 1 else "")


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(fmean(known) if known else None, stdev(known) if len(known) > 1 else None)


def _paired(mine: Sequence[Row], runs: Sequence[Row]) -> str:
    """The mean and the standard deviation of the differences to the baseline with the same seed."""
    baseline = {run["seed"]: run["test_accuracy"] for run in runs if run["algorithm"] == BASELINE}
    differences = [
        run["test_accuracy"] - baseline[run["seed"]]
        for run in mine
        if None not in (run["test_accuracy"], baseline.get(run["seed"]))
    ]
    if mine[0]["algorithm"] == BASELINE or not differences:
        return "–"
    pairs = f" ({_seeds(len(differences))})" if len(differences) < len(mine) else ""
    return points(differences) + _interval(differences) + pairs


def _interval(differences: Sequence[float]) -> str:
    """The percentile bootstrap interval of their mean, in percentage points; none of fewer than three."""
    if len(differences) < 3:
        return ""
    import numpy as np

    drawn = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences)))
    low, high = (100 * float(value) for value in np.percentile(drawn.mean(1), [2.5, 97.5]))
    return f" [{low:+.1f}, {high:+.1f}]"


def _marks(runs: Sequence[Row]) -> str:
    """What a method's name is followed by: no global student, not finished."""
    return "*" * bool(runs[0]["evaluated_model"] == "clients") + "†" * _unfinished(runs)


def _unfinished(runs: Sequence[Row]) -> bool:
    return any(run.get("unfinished") for run in runs)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
