"""Scenario files of published tables: their cells, the options of each, and what was published."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fedkd.core.config import Config
from fedkd.core.errors import UsageError, unknown
from fedkd.core.options import from_file, underscored
from fedkd.distill.config import DistillConfig

FOLDER = Path(__file__).parents[2] / "simulations" / "papers"


class Side(BaseModel):
    """A row or a column of a table: its title, and the options of the command that make it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    options: dict[str, Any] = {}


class PaperColumn(Side):
    """A column; ``target`` is the test accuracy to reach, a fraction, in a table of rounds."""

    target: float | None = None


class PaperRow(Side):
    """A row with its published numbers, one for each column (nan: none), and their spread, if it was published.

    ``key`` says which number of a run is meant: one of ``rounds.jsonl``; or the network of ``fedkd.distill``, and its
    key in ``result.json`` if it is not the accuracy (``student.largest_test_accuracy``).
    """

    published: list[float]
    spread: list[float] = []
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
    differs: list[str]
    command: Literal["simulate", "distill"] = "simulate"
    measure: Literal["last", "best", "rounds"]
    tolerance: float
    samples: int
    seeds: int
    options: dict[str, Any]
    columns: list[PaperColumn]
    rows: list[PaperRow]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for row in self.rows:
            if {len(row.published), len(row.spread) or len(self.columns)} != {len(self.columns)}:
                raise ValueError(f"the row {row.name} has not one number for each column")
        for column in self.columns:
            if (column.target is None) == (self.measure == "rounds"):
                raise ValueError(f"the column {column.name} has a target if, and only if, rounds are published")
        if self.command == "distill" and self.measure != "last":
            raise ValueError("measure is last with fedkd.distill; the key of a row may name another number")
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
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and not path.exists():
        if not names():
            raise UsageError(f"{FOLDER} is not there: clone the repository, or name a scenario file, ./mine.toml.")
        raise UsageError(unknown("table", name, names()))
    try:
        return Paper.model_validate(_located(from_file(path), path.parent))
    except ValidationError as error:
        first = error.errors()[0]
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

    Raises:
        UsageError: the command does not know an option or a value.

    """
    cells: list[Cell] = []
    shared: dict[str, str] = {}
    for row, (place, column) in product(paper.rows, enumerate(paper.columns)):
        if math.isnan(published := row.published[place]):
            continue
        options = underscored({**paper.options, **column.options, **row.options, **changes})
        key = row.key or ("student" if paper.command == "distill" else "test_accuracy")
        if paper.command == "distill":
            config: Config | DistillConfig = _distillation(options, scale)
        else:
            config = _simulation(options, scale, paper.measure, f"{key}>={column.target}" if column.target else "")
        name = re.sub(r"[^a-z0-9.]+", "-", f"{row.name}-{column.name}".lower()).strip("-")
        run_name = shared.setdefault(json.dumps(config.run_config(), sort_keys=True), name)
        spread = row.spread[place] if row.spread and not math.isnan(row.spread[place]) else None
        cells.append(Cell(row.name, column.name, published, spread, key, column.target, config, run_name))
    return cells


def _simulation(options: dict[str, Any], scale: float, measure: str, stop_when: str) -> Config:
    """The student is evaluated in each round; clients and teacher where a table needs them."""
    config = Config.parse(options)
    rounds = max(1, round(config.rounds * scale))
    every = rounds if measure == "last" else min(rounds, config.evaluate_every)
    return dataclasses.replace(config, rounds=rounds, evaluate_every=every, stop_when=stop_when)


def _distillation(options: dict[str, Any], scale: float) -> DistillConfig:
    config = DistillConfig.parse(options)
    epochs, teacher_epochs = max(1, round(config.epochs * scale)), round(config.teacher_epochs * scale)
    return dataclasses.replace(config, epochs=epochs, teacher_epochs=teacher_epochs)


def images(paper: Paper, config: Config | DistillConfig) -> float:
    """The images on which clients train in a run, or the students of ``fedkd.distill``."""
    if isinstance(config, DistillConfig):
        return 2.0 * config.epochs * paper.samples  # with a teacher and without
    if config.local_steps:
        return config.rounds * config.participation * config.clients * config.local_steps * config.batch_size
    return config.rounds * config.participation * paper.samples * config.local_epochs
