"""Options of a command: flags win over FEDKD_* variables, those over the scenario file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

from fedkd.core.config import Options
from fedkd.core.errors import FedkdError, StorageError, Terminated, UsageError

ALIASES = {"FEDKD_DATA": "data_dir"}


AnyOptions = TypeVar("AnyOptions", bound=Options)


def main(
    command: Callable[[AnyOptions], Path], options: type[AnyOptions], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command whose options are the fields of a config, and which returns the directory of its result."""
    run(_app(command, options), argv)


def new(name: str) -> App:
    """A command without options yet."""
    return App(
        name=name,
        help_flags=["--help", "-h"],
        version_flags=[],
        result_action="return_value",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # `run` answers it
    )


def run(app: App, argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, run, and end the process with the documented exit code; no traceback for a mistake."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    as_json = _wants_json(tokens)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(UsageError(" ".join(str(error).split())), as_json)
    except FedkdError as error:
        _fail(error, as_json)
    except OSError as error:
        _fail(StorageError.of(error), as_json)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only spoil the end
        print("fedkd: interrupted; the rounds so far, if any, are in the run directory.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _wants_json(tokens: Sequence[str]) -> bool:
    """Whether a mistake is to be answered in JSON too, as far as can be told before anything is parsed."""
    if "--json" in tokens:
        return True
    said = os.environ.get("FEDKD_JSON", "")
    if not said and tokens and tokens[0].endswith(".toml"):
        with suppress(UsageError):
            said = str(from_file(Path(tokens[0])).get("json", ""))
    return said.lower() in ("1", "true", "yes", "on", "t", "y")


def _terminated(signum: int, frame: object) -> NoReturn:
    print("fedkd: terminated.", file=sys.stderr)
    raise Terminated(128 + signum)


def _fail(error: FedkdError, as_json: bool) -> NoReturn:
    print(f"fedkd: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"status": "error", "code": error.code, "message": str(error)}))
    sys.exit(error.code)


def _app(command: Callable[[AnyOptions], Path], options: type[AnyOptions]) -> App:
    """A cyclopts app with a flag for each field of the config, none of them required."""

    def run(scenario: Path | None = None, **flags: Any) -> None:
        given = {key: value for key, value in flags.items() if value is not None}
        config = options.parse(from_file(scenario) | from_environment(os.environ, options) | given)
        # Standard output is for one JSON object then: what anybody's code prints goes to standard error.
        with redirect_stdout(sys.stderr) if config.json else nullcontext():
            out = command(config)
        if config.json:
            print((out / "result.json").read_text(encoding="utf-8"), end="")

    first = Parameter(help="Scenario file (TOML) with these options as keys.", group=Group("Scenario", sort_key=0))
    parameters = [
        inspect.Parameter(
            "scenario",
            inspect.Parameter.POSITIONAL_ONLY,
            default=None,
            annotation=Annotated[Path | None, first],
        )
    ]
    run.__signature__ = inspect.Signature([*parameters, *_flags(options)])  # type: ignore[attr-defined]
    run.__annotations__ = {}
    run.__doc__ = inspect.getdoc(command)
    app = new(f"python -m fedkd.{command.__name__}")
    app.default(run)
    return app


def _flags(options: type[Options]) -> list[inspect.Parameter]:
    hints = get_type_hints(options)
    groups: dict[str, Group] = {}
    flags = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        extra = field.default.json_schema_extra  # type: ignore[union-attr]
        default = field.default.default  # type: ignore[union-attr]
        name = extra["group"]
        group = groups.setdefault(name, Group(name, sort_key=len(groups) + 1))
        several = extra["several"]
        shown = (
            ""
            if default == "" or default is False
            else f" [default: {str(default).lower() if default is True else default}]"
        )
        parameter = Parameter(
            help=f"{field.default.description}{shown}",  # type: ignore[union-attr]
            group=group,
            show_default=False,
            consume_multiple=several,
            negative=() if default is False or several else None,
        )
        kind = tuple[str, ...] if several else hints[field.name]
        flags.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, parameter]
            )
        )
    return flags


def from_file(path: Path | None) -> dict[str, Any]:
    """The keys of a scenario file.

    Raises:
        UsageError: there is no such file, or it is not TOML.

    """
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the scenario file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    return {key.replace("-", "_"): value for key, value in values.items()}


def from_environment(environment: Mapping[str, str], options: type[Options]) -> dict[str, str]:
    """Options set by FEDKD_NAME variables. Others of that prefix are left to whoever set them."""
    names = {f"FEDKD_{f.name.upper()}": f.name for f in dataclasses.fields(options)} | ALIASES  # type: ignore[arg-type]
    return {names[key]: value for key, value in environment.items() if key in names and value}
