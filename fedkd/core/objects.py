"""Objects in place of spec strings: ``algorithm=DSFL(temperature=0.2)`` is ``algorithm="dsfl:temperature=0.2"``.

A run is repeated from its ``config.toml``, and other processes take part in it. So an object is passed on as the text
that makes it: its name, and its options.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedkd.core import quotes
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import UsageError

MAIN = "__main__"  # the script or notebook that runs


def as_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with specs in place of objects; a list of components is one per client in turn, or several methods.

    Raises:
        UsageError: an object has no name, or its options are no numbers or texts.

    """
    options = {}
    for key, value in given.items():
        listed = list(value) if isinstance(value, list | tuple) else [value]
        if not any(map(_is_component, listed)) and not (key == "model" and isinstance(value, list | tuple)):
            options[key] = str(value) if isinstance(value, Path) else value
            continue
        texts = [spec_of(item) if _is_component(item) else item for item in listed]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{key} is a list of components or of their specs, not {texts!r}.")
        options[key] = ",".join(texts) if key == "model" else texts if len(texts) > 1 else texts[0]
    return options


def only_here(options: Mapping[str, Any]) -> str:
    """A component that the running program itself defines, so that other processes do not know it; empty if none is."""
    for key, value in options.items():
        for text in quotes.split(value, ", ") if isinstance(value, str) and f"{MAIN}:" in value else ():
            if f"{MAIN}:" in text:
                return f"--{key} {text}"
    return ""


def spec_of(component: object) -> str:
    """The spec of a function, of a class, of an object with options as its fields, or of a ``functools.partial``.

    Raises:
        UsageError: another process could not find it by a name, or its options are no numbers or texts.

    """
    if isinstance(component, partial):
        if component.args:
            raise UsageError(f"{component!r} has arguments without a name; options are given by their names.")
        return _with_options(_name_of(component.func), component.keywords)
    if dataclasses.is_dataclass(component) and not isinstance(component, type):
        fields = [field for field in dataclasses.fields(component) if field.init]
        values = {field.name: getattr(component, field.name) for field in fields}
        changed = {f.name: values[f.name] for f in fields if not _is_default(f, values[f.name])}
        return _with_options(_name_of(type(component)), changed)
    if callable(component):
        return _name_of(component)
    raise UsageError(f"{component!r} is no component; give a function, a class, or an object of a method's class.")


def _is_component(value: object) -> bool:
    return callable(value) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(field.default_factory() == value)
    return field.default is not dataclasses.MISSING and field.default == value


def _name_of(component: Callable[..., Any]) -> str:
    """Its name in the catalog, or where it can be imported from."""
    name, where = getattr(component, "__qualname__", ""), getattr(component, "__module__", "") or ""
    module = sys.modules.get(where)
    if not name or getattr(module, name, None) is not component:
        what = name or f"An object of {type(component).__name__}"
        raise UsageError(
            f"{what} has no name by which it could be found again; give a function or a class that a module, a script "
            "or a cell of a notebook defines on its top level (or a function that returns the object)."
        )
    for known in CATALOG.values():
        for short, place in known.items():
            if place == f"{where}:{name}":
                return short
    if "." in where or where == MAIN:
        return f"{where}:{name}"
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"{name} is of the module {where}, which has no file; define it in a file.")
    path = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
    return f"{quotes.quoted(f'./{path}' if path != file else path)}:{name}"


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    items = ",".join(f"{key}={_text(key, value)}" for key, value in options.items())
    return f"{name}:{items}" if items else name


def _text(key: str, value: object) -> str:
    """The value of an option as a spec writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if _is_component(value):
        return quotes.quoted(spec_of(value))
    if isinstance(value, str | Path):
        return quotes.quoted(str(value))
    if isinstance(value, list | tuple):
        return "+".join(_text(key, item) for item in value)
    raise UsageError(f"{key}={value!r} cannot be an option of a component: it is neither a number nor a text.")
