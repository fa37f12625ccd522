"""Tables of several methods side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.evaluation.metrics import bytes_to, common_accuracy
from fedkd.evaluation.report.text import percent, points, seconds, size, spread

if TYPE_CHECKING:
    from fedkd.evaluation.metrics import Row

Curves = Mapping[tuple[str, int], Sequence["Row"]]  # (algorithm, seed) -> the rows of its rounds
BASELINE = "fedavg"
LISTED = 5  # clients in a cell


@dataclass(frozen=True)
class Grid:
    """A table as text: its titles, a row for each method, and a caption."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=self.caption, caption_justify="left")
        table.add_column(self.titles[0], overflow="fold")
        for title in self.titles[1:]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---", *["---:"] * (len(self.titles) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.titles, rule, *self.rows)]
        return "\n".join([*lines, "", self.caption.replace("\n", " ")])


def side_by_side(runs: Sequence[Row], curves: Curves) -> Grid:
    """A row for each method: means over seeds, with the standard deviation where there are several."""
    common = common_accuracy(list(curves.values()))
    names = list(dict.fromkeys(run["algorithm"] for run in runs))
    is_even = len({sum(run["algorithm"] == name for run in runs) for name in names}) == 1
    is_paired = BASELINE in names and len(names) > 1
    is_validated = any(run.get("best_round") is not None for run in runs)
    is_local = any(run.get("local_accuracy") is not None for run in runs)
    has_lengths = len({len(rows) for rows in curves.values()}) > 1  # some have ended early
    titles = ["method", "test acc", *([f"Δ {BASELINE}"] if is_paired else []), "last 5", "teacher", "clients"]
    titles += ["local", "local p10", "student local"] * is_local
    titles += ["validation", "test at best"] * is_validated + ["rounds"] * has_lengths
    titles += ["uplink", "downlink", "training", "evaluation"]
    titles += ["bytes to common" if common is None else f"bytes to {percent(common)}"]
    rows = []
    for name in names:
        mine = [run for run in runs if run["algorithm"] == name]
        spent = [None if common is None else bytes_to(common, curves[name, run["seed"]]) for run in mine]
        reached = [value for value in spent if value is not None]
        cells = {key: _spread([run[key] for run in mine]) for key in ("test_accuracy", "test_accuracy_last5")}
        cells |= {key: _spread([run[key] for run in mine]) for key in ("teacher_accuracy", "client_accuracy")}
        if is_local:
            keys = ("local_accuracy", "local_accuracy_p10", "student_local_accuracy")
            cells |= {key: _spread([run[key] for run in mine]) for key in keys}
        if is_validated:
            cells |= {k: _spread([run[k] for run in mine]) for k in ("best_validation_accuracy", "best_test_accuracy")}
        accuracy, *others = cells.values()
        others += [f"{fmean(len(curves[name, run['seed']]) for run in mine):.1f}".removesuffix(".0")] * has_lengths
        rows.append(
            [
                name + "*" * (mine[0]["evaluated_model"] == "clients") + f" ({_seeds(len(mine))})" * (not is_even),
                accuracy,
                *([_paired(mine, runs)] if is_paired else []),
                *others,
                *(
                    size(fmean(run[key] for run in mine))
                    for key in ("uplink_serialized_bytes", "downlink_serialized_bytes")
                ),
                *(seconds(fmean(run[key] for run in mine)) for key in ("training_seconds", "evaluation_seconds")),
                size(fmean(reached)) if len(reached) == len(mine) else "–",
            ]
        )
    caption = [
        "uplink, downlink: serialized bytes of all clients and rounds; bytes to …: of both, until that accuracy;",
        "training: of clients and server; evaluation: of clients and student on the test set.",
    ]
    if (sample := runs[0].get("client_test_samples")) != (whole := runs[0].get("test_samples")):
        caption.append(
            f"teacher, clients: on {sample:,} of the {whole:,} test images, the same for all methods and seeds."
        )
    if is_paired:
        caption.append(f"Δ {BASELINE}: difference in percentage points, paired by seed.")
    if is_local:
        caption.append(
            "local, student local: mean accuracy of a client's model, and of the student, on the client's local test "
            "split;\nlocal p10: that of the client at the 10th percentile."
        )
    if is_validated:
        caption.append("validation: the highest validation accuracy; test at best: test accuracy in that round.")
    if any(run["evaluated_model"] == "clients" for run in runs):
        caption.append("*: no global student; the test accuracy is the mean of the clients' own models.")
    if any(None in [row["test_accuracy"] for row in rows] for rows in curves.values()):
        caption.append("–: not evaluated in every round (--evaluate-every).")
    return Grid(titles, rows, "\n".join(caption))


def largest(curves: Curves) -> Grid:
    """Test accuracy after the last round, and the largest of all rounds, as some published tables report it."""
    lines = []
    for name in dict.fromkeys(name for name, _ in curves):
        mine = [[row["test_accuracy"] for row in rows] for (algorithm, _), rows in curves.items() if algorithm == name]
        most = [max((value for value in each if value is not None), default=None) for each in mine]
        lines.append([name, _spread([each[-1] for each in mine]), _spread(most)])
    caption = "largest: of all rounds, chosen on the test set, so it is too high."
    return Grid(["method", "last round", "largest on test"], lines, caption)


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


def ledger(runs: Sequence[Row]) -> Grid:
    """The bytes of each method in all: as float32, at the entropy bound, encoded and serialized."""
    rows = []
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        sizes = [fmean(run[key] for run in mine) for key in ("float32_bytes", "entropy_bound_bytes", "encoded_bytes")]
        serialized = fmean(run["uplink_serialized_bytes"] + run["downlink_serialized_bytes"] for run in mine)
        equal = [run["break_even_proxy_size"] for run in mine if run["break_even_proxy_size"] is not None]
        rows.append([name, *map(size, sizes), size(serialized), f"{int(fmean(equal)):,}" if equal else "–"])
    caption = (
        "entropy bound: of the symbols one by one, floats as encoded; serialized: with names and headers;\n"
        "break-even: proxy samples per round at which the uplink takes as many bytes as the student's weights."
    )
    return Grid(["method", "float32", "entropy bound", "encoded", "serialized", "break-even"], rows, caption)


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
    return points(differences) + pairs


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
