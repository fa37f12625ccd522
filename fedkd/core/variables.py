"""FEDKD_* environment variables: options of commands, and the place of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from fedkd.core.options import Options

OPTIONS = ("fedkd.core.config:Config", "fedkd.distill.config:DistillConfig")  # of commands that read FEDKD_* variables
ALIASES = {"FEDKD_DATA": "data_dir"}
OTHER_VARIABLES = {"FEDKD_CACHE"}


def read(environment: Mapping[str, str], options: type[Options]) -> dict[str, str]:
    """The options that are set by FEDKD_NAME variables."""
    names = {f"FEDKD_{f.name.upper()}": f.name for f in dataclasses.fields(options)} | ALIASES  # type: ignore[arg-type]
    return {names[key]: value for key, value in environment.items() if key in names and value}


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each FEDKD_* variable that is no option of any command."""
    unknown_names = {key for key in environment if key.startswith("FEDKD_")} - OTHER_VARIABLES - ALIASES.keys()
    if not unknown_names:
        return []
    known = OTHER_VARIABLES | ALIASES.keys()
    for path in OPTIONS:
        module, _, name = path.partition(":")
        fields = dataclasses.fields(getattr(import_module(module), name))
        known |= {f"FEDKD_{field.name.upper()}" for field in fields}
    notes = []
    for key in sorted(unknown_names - known):
        near = get_close_matches(key, known, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else "."
        notes.append(f"the environment variable {key} is ignored: there is no such option{hint}")
    return notes
