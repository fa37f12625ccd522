"""Scenario files whose settings, methods and seeds are runs of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedkd.compare import reading
from fedkd.core import variables
from fedkd.core.config import Config
from fedkd.core.errors import FedkdError, UsageError, unknown
from fedkd.core.options import from_file, underscored
from fedkd.core.subruns import complete
from fedkd.simulate.checks import check

#: Options that do not belong into the sweep of a scenario file.
REFUSED = Config.MACHINE | {"compare", "evaluate_every", "seed"}


@dataclass(frozen=True)
class Cell:
    """A run of one method with one seed in one setting."""

    config: Config
    about: str
    name: str

    def out(self, folder: Path) -> Path:
        """Its directory: with other options, it is another one."""
        return folder / self.name


@dataclass(frozen=True)
class Sweep:
    """The runs of a scenario file, the options in which their settings differ, and names of methods and values."""

    cells: list[Cell]
    by: list[str]
    labels: Mapping[str, str]

    @property
    def named(self) -> list[str]:
        """The methods, and the values in which settings differ: what can have a name."""
        values = [value for cell in self.cells for value in reading.values(cell.config.run_config(), self.by)]
        return list(dict.fromkeys([*(cell.config.algorithm for cell in self.cells), *values]))


def read(path: Path) -> Sweep:
    """The runs of a scenario file: each combination of the values in ``[sweep]``, each method and each seed.

    ``[names]`` has names of methods and values for tables and figures. Without a ``[sweep]`` there is one setting.

    Raises:
        UsageError: an option or a value is not known.

    """
    values = from_file(path)
    labels = _table(path, values, "names")
    varied = underscored(_table(path, values, "sweep"))
    for key, value in values.items():
        if isinstance(value, dict):
            raise UsageError(f"{path}: {unknown('table', key, ['sweep', 'names'])}")
    for key in varied:
        if key in REFUSED:
            raise UsageError(f"{path}: {key} is no option that a sweep may vary.")
    sources = dict.fromkeys(values, f" in {path}")
    values |= variables.read(os.environ, Config)
    lists = {key: value if isinstance(value, list) else [value] for key, value in varied.items()}
    if empty := [key for key, each in lists.items() if not each]:
        raise UsageError(f"{path}: {empty[0]} has no value in [sweep].")
    methods, seeds = lists.pop("algorithm", None), lists.pop("seeds", None)
    if methods:
        values |= {"algorithm": methods[0], "compare": methods[1:]}
    if seeds:
        if len(seeds) > 1:
            raise UsageError(f"{path}: seeds is one number in [sweep]: so many seeds, from --seed on.")
        values |= {"seeds": seeds[0]}
    cells: list[Cell] = []
    for combination in product(*lists.values()):
        setting = dict(zip(lists, combination, strict=True))
        config = Config.parse({**values, **setting}, sources | dict.fromkeys(setting, f" in [sweep] of {path}"))
        cells += [_cell(path, run, setting) for run in config.runs(config.dataset)]
    by = [key.replace("_", "-") for key, each in lists.items() if len(each) > 1]
    sweep = Sweep(cells, by, labels)
    _check_cells(path, sweep)
    return sweep


def _check_cells(path: Path, sweep: Sweep) -> None:
    """Refuse a run that is there twice, and what is no name of a method or a value."""
    cells = sweep.cells
    if twice := [cell.about for number, cell in enumerate(cells) if cell in cells[:number]]:
        raise UsageError(f"{path} has a run twice: {twice[0]}; remove one.")
    for name, label in sweep.labels.items():
        if name not in sweep.named:
            raise UsageError(f"{path}: {unknown('method or value in [names]', name, sweep.named)}")
        if not isinstance(label, str) or not label:
            raise UsageError(f"{path}: the name of {name} in [names] is {label!r}; write a text.")


def _table(path: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    """A table of a scenario file, which is removed from its values."""
    table = values.pop(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} is a table: write [{name}] on a line of its own, and its keys below.")
    return table


def _cell(path: Path, config: Config, setting: Mapping[str, Any]) -> Cell:
    about = ", ".join([config.algorithm, *map(str, setting.values()), f"seed {config.seed}"])
    config = replace(config, out="", json=False)
    try:
        check(config)
    except FedkdError as error:
        raise UsageError(f"{path}: {about}: {error}") from error
    machine = Config.MACHINE - ({"precision"} if config.precision != "auto" else set())
    fixed = {key: each for key, each in config.run_config().items() if key.replace("-", "_") not in machine}
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9.]+", "-", about.lower()).strip("-")[:80]
    return Cell(config, about, f"{words}-{digest}")


def run(sweep: Sweep, folder: Path) -> list[Path]:
    """The directories of all runs, after those have been run that have not ended."""
    for number, cell in enumerate(sweep.cells, 1):
        complete("simulate", cell.config, cell.out(folder), f"{number} of {len(sweep.cells)}: {cell.about}")
    return [cell.out(folder) for cell in sweep.cells]
