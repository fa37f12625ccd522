"""``python -m fedkd.list``: all components by kind, with their options, defaults and sources."""

from __future__ import annotations

import json as json_
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import Parameter as Signature
from inspect import getdoc
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import Parameter
from rich.padding import Padding
from rich.text import Text

from fedkd.core import cli, quotes, specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import UsageError, unknown

SOURCE = re.compile(r"\(([^()]*\b(?:19|20)\d\d[^()]*)\)")

WORDS = {str: "text", int: "integer", float: "number", bool: "true|false"}

app = cli.new("list")


@dataclass(frozen=True)
class Option:
    """An option of a component: its type in words, and its default as text.

    The default is None if the option is required, and if leaving it out means something that no value says.
    """

    name: str
    type: str
    default: str | None
    required: bool

    def __str__(self) -> str:
        """As in a spec: ``name=default``; an option without a default has its type instead, in brackets if optional."""
        text = f"{self.name}={self.type if self.default is None else self.default}"
        return text if self.required or self.default is not None else f"[{text}]"


@dataclass(frozen=True)
class Component:
    """A component of the catalog, or of an installed package."""

    kind: str
    name: str
    summary: str
    source: str
    options: tuple[Option, ...]


@app.default
def list_(
    kind: Annotated[str, Parameter(help=f"One kind only: {', '.join(CATALOG)}.")] = "",
    /,
    *,
    json: Annotated[bool, Parameter(help="Print JSON on standard output.", negative=())] = False,
) -> None:
    """List the components that can be named on the command line: a spec is name:option=value,option=value.

    A user-defined component is named as package.module:Name or ./file.py:Name.
    """
    if kind and kind not in CATALOG:
        raise UsageError(unknown("kind of component", kind, CATALOG))
    found = [component(each, name) for each in ([kind] if kind else CATALOG) for name in specs.names(each)]
    if json:
        print(json_.dumps([asdict(one) for one in found], indent=2))
        return
    console = cli.Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for each in dict.fromkeys(one.kind for one in found):
        console.print(f"\n[bold]{each}[/bold]")
        for one in (one for one in found if one.kind == each):
            options = ",".join(map(str, one.options)).replace(" ", "")
            console.print(f"  {one.name}" + (f":{options}" if options else ""), markup=False)
            console.print(Padding(Text(one.summary.replace("``", "`")), (0, 0, 0, 6)))


def component(kind: str, name: str) -> Component:
    """What a component's signature and documentation say about it."""
    function, options = specs.options_of(kind, name)
    summary = (getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    source = SOURCE.search(summary) or SOURCE.search(
        (sys.modules[function.__module__].__doc__ or "").partition("\n")[0]
    )
    described = tuple(
        Option(quotes.hyphened(key), type_name(annotation), default_text(default), default is Signature.empty)
        for key, (annotation, default) in options.items()
        if not (kind == "model" and key == "classes")  # which fedkd sets itself
    )
    return Component(kind, name, summary, source[1] if source else "", described)


def type_name(annotation: Any) -> str:
    """An annotation in words: the choices of a Literal, else the name of the type."""
    if annotation is Signature.empty:
        return "value"
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"{type_name(get_args(annotation)[0])}+..."
    choices: Sequence[Any] = [each for each in get_args(annotation) if each is not type(None)]
    if choices:
        return "|".join(map(type_name, choices))
    return WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def default_text(default: Any) -> str | None:
    """A default as it is written in a spec."""
    if default is Signature.empty or default is None or default == "":
        return None
    if isinstance(default, tuple):
        return "+".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    cli.run(app)
