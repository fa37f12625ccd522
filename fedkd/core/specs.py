"""Spec strings: ``name:key=value,...`` names a component and sets its options.

A component is a name in the catalog or of an installed package, ``package.module:Name``, or ``./file.py:Name``.
Its options are its keyword-only parameters (of a class: all parameters of its constructor). Their annotations check
and convert the values. A path or a value that has ``=``, ``,``, ``:`` or spaces stands in double quotes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedkd.core.catalog import CATALOG
from fedkd.core.errors import FedkdError, PluginError, Terminated, UsageError, unknown
from fedkd.core.quotes import hyphened, split, unquoted
from fedkd.core.seeds import derive
from fedkd.core.values import MAX_INTEGER, reason


@dataclass(frozen=True)
class Spec:
    """A parsed spec string. ``argument`` is the one item without a key (``folder:PATH``)."""

    text: str
    name: str
    argument: str | None
    options: Mapping[str, str]

    @property
    def is_plugin(self) -> bool:
        """Whether the name is a dotted path or a file path."""
        return ":" in self.name


#: For people whose path has such a character. The shell removes double quotes that are not inside single ones.
QUOTED = """a value with = or , stands in double quotes, on the command line as 'name:key="VALUE"'."""


def parse(text: str) -> Spec:
    """The parts of a spec string, without quotes.

    Raises:
        UsageError: it cannot be read.

    """
    head, items = _items(text)
    argument: str | None = None
    options: dict[str, str] = {}
    for item in items:
        key, *value = split(item, "=", 1)
        key = _key(key)
        if not value and argument is None and not options:
            argument = unquoted(item)
        elif not value or key in options or not key.isidentifier():
            last = f", a list as {[*options][-1]}={[*options.values()][-1]}+{key}" if options and not value else ""
            raise UsageError(f"Cannot read {item!r} in {text!r}; write name:key=value,key=value{last}; {QUOTED}")
        else:
            options[key] = unquoted(value[0].strip())
    return Spec(text, _name(head), argument, options)


def without(text: str, key: str) -> tuple[str, str | None]:
    """A spec without one of its options, otherwise as it is written, and the value of that option (None: not given)."""
    value = parse(text).options.get(key)
    if value is None:
        return text, None
    head, items = _items(text)
    rest = ",".join(item for item in items if "=" not in item or _key(item.partition("=")[0]) != key)
    return head + (f":{rest}" if rest else ""), value


def _items(text: str) -> tuple[str, list[str]]:
    """What stands before the options of a spec, and its comma-separated items, as they are written."""
    head, *rest = split(text.strip(), ":", 1)
    if _is_file(head) or re.fullmatch(r"\w+(\.\w+)+|__main__", head):
        attribute, *rest = split(rest[0], ":,", 1) if rest else [""]
        if not attribute.isidentifier():
            raise UsageError(f"{text!r} names no component; write {head}:Name.")
        head = f"{head}:{attribute}"
    return head, [item for item in split(rest[0], ",") if item] if rest else []


def _is_file(head: str) -> bool:
    return unquoted(head).endswith(".py")


def _name(head: str) -> str:
    """The name in a spec: of a component in a file, without the quotes of its path."""
    path, *attribute = split(head, ":", 1)
    return ":".join([unquoted(path) if _is_file(path) else path, *attribute])


def _key(text: str) -> str:
    return text.strip().replace("-", "_")


def is_user_defined(text: str) -> bool:
    """Whether it names a user-defined component, or has an option that does."""
    spec = parse(text)
    return spec.is_plugin or any(_is_plugin(value) for value in spec.options.values() if ":" in value)


def _is_plugin(value: str) -> bool:
    """Whether the value of an option names a user-defined component; it may be no spec at all, but a path."""
    try:
        return parse(value).is_plugin
    except UsageError:
        return False


@contextmanager
def attributing(named: Iterable[tuple[str, str]], where: str) -> Iterator[None]:
    """Attribute an exception in this block to the user-defined components among ``named``, pairs of (option, spec).

    If none of them is user-defined, the exception passes unchanged.

    Raises:
        PluginError: one sentence with the line of code that raised.

    """
    try:
        yield
    except (FedkdError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        own = " or ".join(f"--{option} {text}" for option, text in named if is_user_defined(text))
        if not own:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"{own} failed {where}: {type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})."
        ) from error


def bind(kind: str, text: str, reserved: tuple[str, ...] = ()) -> partial[Any]:
    """The component that ``text`` names, with its options bound and checked; call it to use it.

    ``reserved`` are parameters that fedkd fills in itself.

    Raises:
        UsageError: an unknown name or option, or a value that does not fit.
        PluginError: a user-defined component that cannot be imported.

    """
    spec = parse(text)
    component = _find(kind, spec)
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError) as error:
        raise PluginError(f"{kind} {text!r} cannot be used: {error}.") from error
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    if spec.argument is not None and not positional:
        raise UsageError(f"{kind} {spec.name!r} takes key=value options, not {spec.argument!r}.")
    if spec.argument is None and positional and positional[0].default is inspect.Parameter.empty:
        hint = f"; {QUOTED}" if spec.options else "."
        raise UsageError(f"{kind} {spec.name!r} needs a value: {spec.name}:{positional[0].name.upper()}{hint}")
    options = _options(component, parameters, reserved)
    values = {}
    for key, value in spec.options.items():
        if key not in options:
            hint = f" In {text}, {QUOTED}" if "/" in text else ""  # it may be a part of a path
            raise UsageError(unknown(f"option of {kind} {spec.name!r}:", hyphened(key), map(hyphened, options)) + hint)
        values[key] = _convert(f"{spec.name}:{hyphened(key)}", value, _annotation(component, options[key]))
    arguments = () if spec.argument is None else (spec.argument,)
    return partial(component, *arguments, **values)


def built_in(kind: str, text: str) -> partial[Any]:
    """The same for a kind of which fedkd's own components are the only ones; others are a `UsageError`."""
    if (name := parse(text).name) not in CATALOG[kind]:
        raise UsageError(unknown(kind, name, CATALOG[kind]))
    return bind(kind, text)


def call(kind: str, text: str, reserved: tuple[str, ...] = ()) -> Any:
    """What the component returns when it is called with its options.

    Raises:
        UsageError, PluginError: as `bind`, or the component refuses the options.

    """
    bound = bind(kind, text, reserved)
    for name, parameter in inspect.signature(bound).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY:
            raise UsageError(f"{kind} {text!r} needs the option {hyphened(name)} (python -m fedkd.list {kind}).")
    try:
        return bound()
    except (FedkdError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        if is_user_defined(text):
            raise PluginError(f"{kind} {text!r} cannot be used: {type(error).__name__}: {error}.") from error
        if isinstance(error, TypeError | ValueError):
            raise UsageError(f"{kind} {text!r} cannot be used: {error}.") from error
        raise


def options_of(kind: str, name: str) -> tuple[Callable[..., Any], dict[str, tuple[Any, Any]]]:
    """A component without its options bound, and its options: the annotation and the default value of each.

    A positional argument is listed under its name in capital letters, as in ``hf:NAME``.
    """
    component = _find(kind, parse(name))
    parameters = inspect.signature(component).parameters
    positional = {n.upper(): p for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY}
    chosen = positional | _options(component, parameters, ())
    return component, {n: (_annotation(component, p), p.default) for n, p in chosen.items()}


def has_option(kind: str, text: str, key: str) -> bool:
    """Whether the component that ``text`` names has an option of this name."""
    component = _find(kind, parse(text))
    return key in _options(component, inspect.signature(component).parameters, ())


def names(kind: str) -> list[str]:
    """The names of all components of a kind, built-in ones first."""
    return [*CATALOG[kind], *sorted(point.name for point in entry_points(group=f"fedkd.{kind}"))]


def _find(kind: str, spec: Spec) -> Callable[..., Any]:
    """The class or function itself."""
    if spec.is_plugin:
        return _import(kind, spec.name)
    if spec.name in CATALOG[kind]:
        return _import(kind, CATALOG[kind][spec.name])
    installed = {point.name: point for point in entry_points(group=f"fedkd.{kind}")}
    if spec.name not in installed:
        own = "A user-defined one is written package.module:Name or ./file.py:Name."
        hint = "Several are separated by spaces, not by commas." if "," in spec.name else own
        raise UsageError(f"{unknown(kind, spec.name, {*CATALOG[kind], *installed})} {hint}")
    return _import(kind, installed[spec.name].value)


def _import(kind: str, path: str) -> Callable[..., Any]:
    """The attribute ``where:name``, from a module or a file. Importing runs its code."""
    where, _, name = path.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # anything that a user's module raises while it is imported
        raise PluginError(f"Cannot import {kind} {path!r}: {type(error).__name__}: {error}.") from error
    component = getattr(module, name, None)
    if not callable(component):
        if where == "__main__":
            raise PluginError(f"{kind} {path!r} is known only to the program or notebook that defines it; go on there.")
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise PluginError(unknown(f"name in {where}:", name, own))
    return component  # type: ignore[no-any-return]


def _module_of_file(path: Path) -> Any:
    """A file as a module; it is imported once."""
    path = path.expanduser().resolve()
    name = f"fedkd_plugin_{path.stem}_{derive(0, str(path)):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _options(
    component: object, parameters: Mapping[str, inspect.Parameter], reserved: tuple[str, ...]
) -> dict[str, inspect.Parameter]:
    """The parameters that a spec may set."""
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in reserved
        and (
            parameter.kind is parameter.KEYWORD_ONLY
            or (inspect.isclass(component) and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        )
    }


def _annotation(component: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation as a type. Only that of this option is evaluated: others may name types that are not imported."""
    if isinstance(parameter.annotation, str):
        # The annotation of an inherited field is evaluated in the module of its class.
        classes = component.__mro__ if inspect.isclass(component) else ()
        owner = next((c for c in classes if parameter.name in inspect.get_annotations(c)), component)
        try:
            return eval(parameter.annotation, vars(sys.modules[owner.__module__]))
        except Exception as error:
            raise PluginError(f"The annotation of {parameter.name} in {owner.__name__} is wrong: {error}.") from error
    return parameter.annotation


def _convert(name: str, value: str, annotation: Any) -> Any:
    """The text converted by the annotation; without one, a Python literal, or the text itself."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        converted = TypeAdapter(annotation).validate_python(value)
    except PydanticUserError as error:
        raise PluginError(f"{name}: a text cannot become {annotation!r}; annotate the option otherwise.") from error
    except ValidationError as error:
        raise UsageError(f"{name}={value} is not usable: {reason(error)}.") from error
    if isinstance(converted, int) and converted > MAX_INTEGER:
        raise UsageError(f"{name}={value} is not usable: it is more than {MAX_INTEGER}.")
    return converted
