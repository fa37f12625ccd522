"""Reading run directories: which runs go together, their summaries and their rounds."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core import run_directory
from fedkd.core.config import Config
from fedkd.core.errors import DataError, UsageError, unknown
from fedkd.core.notes import say
from fedkd.core.report import students
from fedkd.distill import teacher_names
from fedkd.simulate.page.reading import summaries

if TYPE_CHECKING:
    from fedkd.core.report.rows import Row

Values = tuple[str, ...]  # of the options in which settings differ

#: Options in which two runs may differ: methods, seeds, codecs and the machine.
IGNORED = {"algorithm", "compare", "seed", "seeds", "evaluate-every", "uplink-codec", "downlink-codec"}
IGNORED |= {key.replace("_", "-") for key in Config.MACHINE}
CODECS = {"uplink-codec", "downlink-codec"}  # may differ within a column, or make columns of --by
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
    """The contents of a run directory; of a run of fedkd.simulate also before it has ended.

    Raises:
        UsageError: it is not a run directory, or has nothing yet.
        DataError: a file is damaged.

    """
    file = path / "result.json"
    try:
        with run_directory.readable(path / "config.toml"):
            config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        if not file.exists():  # it is being written, or was killed
            file = path / "env.json"
        result = {"runs": [], **run_directory.read_json(file)}
    except OSError as error:
        raise UsageError(f"{path} is not the directory of a run ({error.filename}: {error.strerror}).") from error
    with run_directory.readable(file):
        dataset = result.get("dataset", config["dataset"])  # a run that failed early has only its options
        return RunFiles(path, {**config, "dataset": dataset}, {**result, "runs": list(result["runs"])})


def by_setting(files: Sequence[RunFiles], by: Collection[str]) -> dict[Values, list[RunFiles]]:
    """The runs by their `values` of the options ``by``.

    Raises:
        UsageError: there is no such option, or the runs differ in another one.

    """
    for key in by:
        if key not in (known := [key for key in files[0].config if key not in IGNORED - CODECS]):
            raise UsageError(unknown("option of --by", key, known))
    _check_settings(files, IGNORED | set(by))
    settings: dict[Values, list[RunFiles]] = {}
    for one in files:
        settings.setdefault(values(one.config, by), []).append(one)
    return settings


def values(options: Mapping[str, Any], by: Collection[str]) -> Values:
    """Values of options as texts; a number has the name of its option."""
    found = {key: options[key] for key in by}
    return tuple(value if isinstance(value, str) and value else f"{key}={value}" for key, value in found.items())


def titles(settings: Collection[Values], labels: Mapping[str, str]) -> list[str]:
    """The title of each setting: its values, or names for them.

    Raises:
        UsageError: two have the same title.

    """
    found = [", ".join(labels.get(value, value) for value in each) for each in settings]
    if twice := [title for title in found if found.count(title) > 1]:
        raise UsageError(f"Two settings have the name {twice[0]!r}; give each another one.")
    return found


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


#: Ends of the keys that hold a number, or none.
NUMBERS = ("accuracy", "last5", "p10", "loss", "bytes", "seconds", "round", "rounds", "seed", "samples", "proxy_size")
#: What tables and figures need of a round; of a run besides; and, where it was evaluated, of both.
OF_ROUND = {"uplink_serialized_bytes", "downlink_serialized_bytes", "training_seconds"}
OF_RUN = {"rounds", "evaluation_seconds", "float32_bytes", "encoded_bytes", "entropy_bound_bytes", "evaluated_model"}
IF_EVALUATED = {"test_accuracy", "teacher_accuracy", "client_accuracy"}


def _check_rows(file: Path, rows: Iterable[Row], needed: Collection[str]) -> None:
    """Refuse rows that lack a key, or have something else in place of a number."""
    for row in rows:
        lacking = [key for key in needed if row.get(key) is None] + [key for key in IF_EVALUATED if key not in row]
        if lacking:
            raise DataError(f"{file} has no {min(lacking)}; it is damaged, or of another version of fedkd.")
        for key, value in row.items():
            if key.endswith(NUMBERS) and not (value is None or isinstance(value, int | float)):
                raise DataError(f"{file} is damaged: {key} is {reprlib.repr(value)}.")


def simulated(files: Sequence[RunFiles]) -> tuple[list[Row], dict[tuple[str, int], list[Row]]]:
    """The summaries of the methods of runs of fedkd.simulate, and their rounds by method and seed.

    A method that has not finished has the totals of its rounds, and the key ``unfinished``.

    Raises:
        UsageError: a run has no round, they differ in more than `IGNORED` or in their partition, or one method and
            seed is in two runs.
        DataError: a file is damaged.

    """
    _check_settings(files, IGNORED)
    found: list[Row] = []
    curves: dict[tuple[str, int], list[Row]] = {}
    partitions: dict[int, str | None] = {}
    for one in files:
        file = one.path / "rounds.jsonl"
        with run_directory.readable(one.path / "result.json"):
            own: dict[tuple[str, int], list[Row]] = {(run["algorithm"], run["seed"]): [] for run in one.result["runs"]}
            _check_rows(one.path / "result.json", one.result["runs"], OF_ROUND | OF_RUN)
        with run_directory.readable(file):
            for row in run_directory.rows(file) if file.exists() else ():
                own.setdefault((row["algorithm"], row["seed"]), []).append(row)
            rows = [row for each in own.values() for row in each]
            _check_rows(file, rows, OF_ROUND | {"round"})
        if lost := [f"{name}, seed {seed}" for (name, seed), rows in own.items() if not rows]:
            raise DataError(f"{file} is missing or damaged: there is no round of {lost[0]}, which result.json has.")
        if not own:
            raise UsageError(f"{one.path} has no round; it was interrupted or failed.")
        with run_directory.readable(file):
            runs = {(run["algorithm"], run["seed"]): run for run in summaries(one.result["runs"], own)}
        for (name, seed), run in runs.items():
            if run.get("unfinished"):
                continue
            if len(own[name, seed]) < run["rounds"]:
                rounds = f"{len(own[name, seed])} of {run['rounds']} rounds of {name}, seed {seed}"
                say(f"{file} has {rounds}; the file has lost lines, and curves end there.")
            if partitions.setdefault(seed, run.get("partition_sha256")) != run.get("partition_sha256"):
                raise UsageError(
                    f"{one.path} has another partition than {files[0].path} with seed {seed}; they cannot be paired."
                )
        if twice := sorted(runs.keys() & curves.keys()):
            raise UsageError(f"{twice[0][0]} with seed {twice[0][1]} is in two of the runs; name one of them.")
        found += runs.values()
        curves |= own
    return found, curves


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
        with run_directory.readable(one.path / "result.json"):
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
