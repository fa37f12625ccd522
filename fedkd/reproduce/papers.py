"""Scenario files of published tables: their cells, the options of each, and what was published."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from fedkd.core.config import Config
from fedkd.core.errors import FedkdError, UsageError, unknown
from fedkd.core.options import from_file, underscored
from fedkd.core.values import Fraction, NonNegativeFloat, PositiveInt
from fedkd.distill import check as check_distillation
from fedkd.distill.config import DistillConfig
from fedkd.simulate.checks import check
from fedkd.simulate.evaluation import stopping


def _not_infinite(number: float) -> float:
    if math.isinf(number):
        raise ValueError("it is not finite")
    return number


Published = Annotated[float, AfterValidator(_not_infinite)]
FOLDER = Path(__file__).parents[2] / "simulations" / "papers"


#: Options that are not those of a cell: they are given by the command, or make several runs of one.
REFUSED = {"seed", "seeds", "compare", "out", "resume", "json"}
#: Numbers of a network in ``result.json`` of fedkd.distill.
OF_NETWORKS = ("accuracy", "best_validation_accuracy", "best_test_accuracy", "largest_test_accuracy")


class Side(BaseModel):
    """A row or a column of a table: its title, and the options of the command that make it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    options: dict[str, Any] = {}


class PaperColumn(Side):
    """A column; ``target`` is the accuracy to reach, a fraction, in a table of rounds."""

    target: Fraction | None = None


class PaperRow(Side):
    """A row with its published numbers, one for each column (nan: none), and their spread, if it was published.

    ``key`` says which number of a run is meant: an accuracy in ``rounds.jsonl``; or the network of ``fedkd.distill``,
    and its key in ``result.json`` if it is not the accuracy (``student.largest_test_accuracy``).
    """

    published: list[Published]
    spread: list[Published] = []
    key: str = ""


class Paper(BaseModel):
    """A scenario file of a published table, in ``simulations/papers``. In its texts, ``{here}`` is its folder.

    ``measure`` says what was published: accuracies of the last round (or epoch) or the largest of all rounds, in
    percent; or the number of rounds to an accuracy. ``tolerance`` has the same unit. ``seeds`` is the number of runs of
    each cell, with seeds from 0; ``samples`` are the private training samples of all clients, or those that a network
    of ``fedkd.distill`` is trained on.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    citation: str
    differs: list[str] = []
    command: Literal["simulate", "distill"] = "simulate"
    measure: Literal["last", "best", "rounds"]
    tolerance: NonNegativeFloat
    samples: PositiveInt
    seeds: PositiveInt
    options: dict[str, Any]
    columns: list[PaperColumn]
    rows: list[PaperRow]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for sides in (self.rows, self.columns):
            if len({side.name for side in sides}) < len(sides):
                raise ValueError("two rows, or two columns, have the same name")
        for row in self.rows:
            if {len(row.published), len(row.spread) or len(self.columns)} != {len(self.columns)}:
                raise ValueError(f"the row {row.name} has not one number for each column")
        for column in self.columns:
            if (column.target is None) == (self.measure == "rounds"):
                raise ValueError(f"the column {column.name} has a target if, and only if, measure is rounds")
        if self.command == "distill" and self.measure != "last":
            raise ValueError("measure is last with fedkd.distill; the key of a row may name another number")
        for options in (self.options, *(side.options for side in (*self.columns, *self.rows))):
            for key in REFUSED & underscored(options).keys():
                raise ValueError(f"{key} is no option of a table; runs and their seeds are given by the command")
        return self


@dataclass(frozen=True)
class Cell:
    """A number of a table, and the options of the runs that give ours; cells with the same options share runs."""

    row: str
    column: str
    published: float
    spread: float | None
    key: str
    target: float | None
    config: Config | DistillConfig
    run_name: str

    def run(self, folder: Path, seed: int) -> Path:
        """The run directory of a seed, in the folder of its table."""
        return folder / f"{self.run_name}-seed{seed}"

    @property
    def length(self) -> int:
        """The number of its rounds, or of its epochs."""
        return self.config.rounds if isinstance(self.config, Config) else self.config.epochs


def names() -> list[str]:
    """The tables in ``simulations/papers``."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str) -> Paper:
    """The scenario file of a table.

    Raises:
        UsageError: there is no such table, or the file does not say what it must.

    """
    path = Path(name) if name.endswith(".toml") or len(Path(name).parts) > 1 else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and not path.exists():
        if not names():
            raise UsageError(f"{FOLDER} is not there: clone the repository, or name a scenario file, ./mine.toml.")
        raise UsageError(unknown("table", name, names()))
    try:
        return Paper.model_validate(_located(from_file(path), path.parent))
    except ValidationError as error:
        errors = error.errors()
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        where = ".".join(map(str, first["loc"])) or "table"
        raise UsageError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from error


def _located(value: Any, folder: Path) -> Any:
    """The same with the folder of the scenario file in place of ``{here}``."""
    if isinstance(value, dict):
        return {key: _located(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_located(each, folder) for each in value]
    return value.replace("{here}", str(folder.resolve())) if isinstance(value, str) else value


def cells_of(paper: Paper, changes: Mapping[str, Any], scale: float) -> list[Cell]:
    """The cells of a table that have a published number, row by row, with ``scale`` of the rounds or epochs.

    A run directory is named by row and column, and by a hash of the options that give its numbers: with other options
    it is another one.

    Raises:
        UsageError: the command does not know an option or a value, or gives no such number.

    """
    cells: list[Cell] = []
    shared: dict[str, str] = {}
    for row, (place, column) in product(paper.rows, enumerate(paper.columns)):
        if math.isnan(published := row.published[place]):
            continue
        options = underscored({**paper.options, **column.options, **row.options})
        key = row.key or ("student" if paper.command == "distill" else "test_accuracy")
        stop_when = f"{key}>={column.target}" if column.target else ""
        try:
            config = _config(paper, options, scale, key, stop_when)
        except FedkdError as error:
            raise UsageError(f"{row.name}, {column.name}: {error}") from error
        digest = json.dumps([options, stop_when, scale], sort_keys=True, default=str)
        name = re.sub(r"[^a-z0-9.]+", "-", f"{row.name}-{column.name}".lower()).strip("-")
        run_name = shared.setdefault(digest, f"{name}-{hashlib.sha256(digest.encode()).hexdigest()[:6]}")
        spread = row.spread[place] if row.spread and not math.isnan(row.spread[place]) else None
        config = dataclasses.replace(config, **changes)
        cells.append(Cell(row.name, column.name, published, spread, key, column.target, config, run_name))
    return cells


def _config(paper: Paper, options: Mapping[str, Any], scale: float, key: str, stop_when: str) -> Config | DistillConfig:
    """The options of a cell, checked as its command checks them.

    The student is evaluated in each round; clients and teacher where a table needs them.
    """
    if paper.command == "distill":
        network, _, number = key.partition(".")
        if network not in ("teacher", "baseline", "student") or number not in ("", *OF_NETWORKS):
            raise UsageError(f"key {key}: it is teacher, baseline or student, and one of {', '.join(OF_NETWORKS)}.")
        distillation = DistillConfig.parse(options)
        with _without_notices():
            check_distillation(distillation)
        epochs, teacher_epochs = (
            max(length and 1, round(length * scale)) for length in (distillation.epochs, distillation.teacher_epochs)
        )
        return dataclasses.replace(distillation, epochs=epochs, teacher_epochs=teacher_epochs)
    if key not in stopping.KEYS or not key.endswith("_accuracy"):
        raise UsageError(unknown("key", key, [each for each in stopping.KEYS if each.endswith("_accuracy")]))
    config = Config.parse(options)
    rounds = max(1, round(config.rounds * scale))
    every = rounds if paper.measure == "last" else min(rounds, config.evaluate_every)
    config = dataclasses.replace(config, rounds=rounds, evaluate_every=every, stop_when=stop_when or config.stop_when)
    stopping.check(dataclasses.replace(config, stop_when=f"{key}>=0"))  # whether the run measures it
    with _without_notices():
        check(config)
    return config


def _without_notices() -> redirect_stderr[io.StringIO]:
    """All rows of a table have the same options, which not every method uses: the runs say so, not a list of tables."""
    return redirect_stderr(io.StringIO())


def images(paper: Paper, config: Config | DistillConfig) -> float:
    """The images on which clients train in a run, or the students of ``fedkd.distill``."""
    if isinstance(config, DistillConfig):
        return 2.0 * config.epochs * paper.samples  # with a teacher and without
    if config.local_steps:
        return config.rounds * config.participation * config.clients * config.local_steps * config.batch_size
    return config.rounds * config.participation * paper.samples * config.local_epochs
