"""``python -m fedkd.compare``: separate runs in one table."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fedkd.core import cli, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import UsageError
from fedkd.distill import teacher_names
from fedkd.evaluation.report import figure, students, table
from fedkd.evaluation.report.screen import Screen

if TYPE_CHECKING:
    from fedkd.evaluation.metrics import Row

app = cli.new("compare")


@app.default
def compare(
    *runs: Annotated[Path, Parameter(help="Run directories, of different methods, losses or seeds.")],
    markdown: Annotated[bool, Parameter(help="Write the tables as Markdown.", negative=())] = False,
    largest: Annotated[
        bool, Parameter(help="Also the largest test accuracy of all rounds or epochs, as in some papers.", negative=())
    ] = False,
    out: Annotated[Path | None, Parameter(help="A directory for curve.png and curve.svg.")] = None,
) -> None:
    """Put methods and seeds of several runs into one table, as if they were one run.

    The runs must have the same options, except for methods, seeds, codecs and the options of the machine (device,
    precision, engine, workers). Runs of fedkd.distill may differ in losses and teachers, and must have the same seeds.
    """
    if not runs:
        raise UsageError("Give at least one run directory.")
    if out is not None and (out / "config.toml").exists():
        raise UsageError(f"--out {out} is a run directory, whose curves would be replaced; name another directory.")
    files = [read_run(path) for path in runs]
    if len({one.is_distilled for one in files}) == 2:
        raise UsageError("Name runs of fedkd.simulate or of fedkd.distill, not of both.")
    curves: table.Curves = {}
    if files[0].is_distilled:
        if out is not None:
            raise UsageError("--out is for curves of fedkd.simulate; runs of fedkd.distill have none.")
        rows = distilled(files)
        grids = [students.side_by_side(rows), *([students.largest(rows)] if largest else [])]
    else:
        finished, curves = simulated(files)
        grids = [table.side_by_side(finished, curves), table.ledger(finished)]
        grids += [table.largest(curves)] if largest else []
    for grid in grids:
        if markdown:
            print(f"{grid.markdown()}\n")
        else:
            Screen(cli.Console()).show(grid.rich())
    if out is not None:
        run_directory.create(out)
        config = files[0].config
        setting = f"{config['dataset']}, {config['clients']} clients, {config['partitioner']}, {config['model']}"
        figure.draw(curves, setting, out)


#: Options in which two runs may differ: methods, seeds, codecs and the machine.
IGNORED = {"algorithm", "compare", "seed", "seeds", "evaluate-every", "uplink-codec", "downlink-codec"}
IGNORED |= {
    key.replace("_", "-")
    for key in Config.RESUMABLE - {"rounds", "patience", "stop_when", "min_clients", "round_retries"}
}
#: The same for two distillations: the teachers and the loss.
IGNORED_DISTILLATION = {"loss", "teacher", "teachers-from", "teacher-epochs", "teacher-weighting", "corrupted-images"}
IGNORED_DISTILLATION |= {"out", "json", "data-dir"}


@dataclass(frozen=True)
class RunFiles:
    """The config and the result of a run directory."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def is_distilled(self) -> bool:
        """Whether it is a run of fedkd.distill."""
        return "teacher-epochs" in self.config


def read_run(path: Path) -> RunFiles:
    """The contents of a run directory.

    Raises:
        UsageError: it is not a run directory, or the run has not ended.

    """
    with _readable(path):
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        return RunFiles(path, {**config, "dataset": result["dataset"]}, {**result, "runs": list(result["runs"])})


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "its files are damaged"
        raise UsageError(f"{path} is not the directory of a run that has ended ({reason}).") from error


def _check_settings(files: Sequence[RunFiles], ignored: set[str]) -> None:
    """Refuse runs that differ in any option that is not ignored."""
    first: dict[str, object] = {}
    for one in files:
        options = {key: value for key, value in one.config.items() if key not in ignored}
        different = sorted(key for key, value in options.items() if first.setdefault(key, value) != value)
        if different:
            raise UsageError(
                f"{one.path} and {files[0].path} differ in {', '.join(different)}; compare runs of one setting."
            )


def simulated(files: Sequence[RunFiles]) -> tuple[list[Row], dict[tuple[str, int], list[Row]]]:
    """The summaries of the finished methods of runs of fedkd.simulate, and their rounds by method and seed.

    Raises:
        UsageError: a run finished no method, they differ in more than `IGNORED` or in their partition, or one method
            and seed is in two runs.

    """
    _check_settings(files, IGNORED)
    finished: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    partitions: dict[int, str] = {}
    for one in files:
        with _readable(one.path):
            runs = {(run["algorithm"], run["seed"]): run for run in one.result["runs"]}
            own: dict[tuple[str, int], list[Row]] = {key: [] for key in runs}
            for row in run_directory.rows(one.path / "rounds.jsonl"):
                if (key := (row["algorithm"], row["seed"])) in own:  # else of a run that has not ended
                    own[key].append(row)
        if not runs or not all(own.values()):
            raise UsageError(f"{one.path} finished no method; it was interrupted or failed.")
        for (_, seed), run in runs.items():
            if partitions.setdefault(seed, run.get("partition_sha256")) != run.get("partition_sha256"):
                raise UsageError(
                    f"{one.path} has another partition than {files[0].path} with seed {seed}; they cannot be paired."
                )
        if twice := sorted(runs.keys() & curves.keys()):
            raise UsageError(f"{twice[0][0]} with seed {twice[0][1]} is in two of the runs; name one of them.")
        finished += runs.values()
        curves |= own
    return finished, curves


def _teacher(name: str) -> str:
    """A spec unchanged, a file by the end of its path."""
    return "/".join(Path(name).with_suffix("").parts[-2:]) if teacher_names.is_path(name) else name


def distilled(files: Sequence[RunFiles]) -> list[tuple[str, str, Sequence[students.Evaluation]]]:
    """The loss, the teachers and the evaluation by seed of each run of fedkd.distill.

    Raises:
        UsageError: one has not ended, or they differ in more than `IGNORED_DISTILLATION` or in the baseline students.

    """
    _check_settings(files, IGNORED_DISTILLATION)
    rows: list[tuple[str, str, Sequence[students.Evaluation]]] = []
    for one in files:
        if one.result.get("status") != "ok":
            raise UsageError(f"{one.path} has not finished; it was interrupted or failed.")
        with _readable(one.path):
            evaluations = [run["evaluation"] for run in one.result["runs"]]
            teachers = ", ".join(_teacher(name) for name in one.result["teachers"]) or "itself"
            rows.append((one.config["loss"], teachers, evaluations))
    baselines = [
        [seed[students.BASELINE][key] for seed in evaluations for key in ("accuracy", "nll")]
        for _, _, evaluations in rows
    ]
    for one, mine in zip(files, baselines, strict=True):
        if mine != baselines[0]:
            raise UsageError(f"{one.path} has other baseline students than {files[0].path}; run both on one machine.")
    return rows


if __name__ == "__main__":
    cli.run(app)
