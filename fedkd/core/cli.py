"""Commands and their options: flags override FEDKD_* variables, which override the scenario file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import rich.console
from cyclopts import App, CycloptsError, Group, Parameter, Token, convert

from fedkd import __version__ as version
from fedkd.core import run_directory, variables
from fedkd.core.errors import (
    FedkdError,
    Interrupted,
    StorageError,
    Terminated,
    UsageError,
    end_by_signal,
    noticing_signals,
)
from fedkd.core.options import Options, from_file
from fedkd.core.values import MAX_INTEGER

#: The commands, also subcommands of ``fedkd``: where each app is (imported when it is used), and one line.
COMMANDS = {
    "simulate": ("fedkd.simulate.__main__:app", "Run federated distillation and other methods, and compare them."),
    "compare": ("fedkd.compare.__main__:app", "Put separate runs, or those of a scenario file, into one table."),
    "distill": ("fedkd.distill.__main__:app", "Distill a student from one or several teachers, or from itself."),
    "export": ("fedkd.export:app", "Write a student for ONNX Runtime, PyTorch or a phone."),
    "serve": ("fedkd.serve:app", "Serve an exported model over HTTP."),
    "partition": ("fedkd.partition:app", "Show which client gets what, without training."),
    "doctor": ("fedkd.doctor:app", "Check this installation and this machine."),
    "list": ("fedkd.list:app", "List all components with their options."),
    "reproduce": ("fedkd.reproduce.__main__:app", "Run a published table, and print our numbers beside it."),
    "bench": ("fedkd.bench.__main__:app", "Measure the speed of fedkd and of other simulators."),
}
#: Names that other tools use for an option.
SYNONYMS = {
    "lr": "learning-rate",
    "local-lr": "learning-rate",
    "server-lr": "distill-learning-rate",
    "wd": "weight-decay",
    "bs": "batch-size",
    "epochs": "local-epochs",
    "server-epochs": "distill-epochs",
    "n-clients": "clients",
    "num-clients": "clients",
    "n-rounds": "rounds",
    "num-rounds": "rounds",
    "fraction": "participation",
    "fraction-train": "participation",
    "fraction-fit": "participation",
    "client-fraction": "participation",
    "sample-rate": "participation",
    "method": "algorithm",
    "strategy": "algorithm",
    "algo": "algorithm",
    "arch": "model",
    "network": "model",
    "alpha": "partitioner dirichlet:alpha",
    "partition": "partitioner",
    "public": "proxy",
    "data": "data-dir",
    "output": "out",
    "output-dir": "out",
    "votes": "weighting",
    "up": "uplink-codec",
    "down": "downlink-codec",
    "gpu": "device cuda",
    "cuda": "device cuda",
    "num-workers": "workers",
    "jobs": "workers",
}


DRY_RUN = "Estimate bytes, time and memory from a few batches instead; nothing is written."
AnyOptions = TypeVar("AnyOptions", bound=Options)


def fedkd() -> NoReturn:
    """The console script ``fedkd``: all commands as subcommands, and ``--install-completion`` for the shell."""
    app = new("fedkd")
    app.help = "Simulate federated distillation; compare methods; distill, export and serve models."
    for name, (path, text) in COMMANDS.items():
        # The command that is run has its own, longer help.
        app.command(path, name=name, **({} if name in sys.argv[1:2] else {"help": text}))
    app.register_install_completion_command(help="Install completion for the shell that is in use.")
    run(app)


def new(name: str) -> App:
    """A command without options yet."""
    usage = f"python -m fedkd.{name}" if name in COMMANDS else name
    return App(
        name=name,
        usage=f"Usage: {usage} {'[OPTIONS] [ARGUMENTS]' if name in COMMANDS else 'COMMAND [OPTIONS]'}",
        help_flags=["--help", "-h"],
        version=f"fedkd {version}",
        version_flags=["--version"],
        console=Console(),
        result_action="return_value",
        help_format="markdown",
        suppress_keyboard_interrupt=False,  # `run` handles it
        default_parameter=Parameter(show_default=shown, converter=_converted),
    )


def run(app: App, argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, run, and end the process with the documented exit code; no traceback for a mistake."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    as_json = _wants_json(tokens)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for commands in the background
            signal.signal(number, _end_in_order)
    try:
        with noticing_signals():
            app(tokens, exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except CycloptsError as error:
        _fail(UsageError(_with_synonym(" ".join(str(error).split()))), as_json)
    except FedkdError as error:
        _fail(error, as_json)
    except BrokenPipeError:
        _end_without_reader()
    except OSError as error:
        _fail(StorageError.of(error), as_json)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would change the exit code
        print("fedkd: interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class Console(rich.console.Console):
    """Rich's console; if the reader of its output is gone (``| head``), the command ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)  # folder:cl is no emoji

    def on_broken_pipe(self) -> None:
        _end_without_reader()


def _end_without_reader() -> NoReturn:
    """End quietly with the code that the shell gives to other tools: 128 and the number of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
    raise Terminated(141)


def _wants_json(tokens: Sequence[str]) -> bool:
    """Whether a mistake is reported as JSON too, as far as is known before anything is parsed."""
    if "--json" in tokens:
        return True
    value = os.environ.get("FEDKD_JSON", "")
    if not value and tokens and tokens[0].endswith(".toml"):
        with suppress(UsageError):
            value = str(from_file(Path(tokens[0])).get("json", ""))
    return value.lower() in ("1", "true", "yes", "on", "t", "y")


def _end_in_order(signum: int, frame: object) -> NoReturn:
    """The first Ctrl-C or SIGTERM: what is open is closed. From then on, Ctrl-C ends the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if signum == signal.SIGINT:
        end_by_signal(Interrupted())
    print("fedkd: terminated.", file=sys.stderr)
    end_by_signal(Terminated(128 + signum))


def _fail(error: FedkdError, as_json: bool) -> NoReturn:
    print(f"fedkd: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"status": "error", "code": error.code, "message": str(error)}))
    sys.exit(error.code)


def _with_synonym(message: str) -> str:
    """The message about an unknown option; if other tools use its name for one of ours, with that one."""
    option = re.search(r"Unknown option: --([\w-]+)", message)
    if option is None or option[1] not in SYNONYMS:
        return message
    return f"Unknown option: --{option[1]}. Did you mean --{SYNONYMS[option[1]]}?"


def command(
    function: Callable[[AnyOptions], Path],
    options: type[AnyOptions],
    check: Callable[[AnyOptions, Collection[str]], object] = lambda config, given: None,
    dry_run: Callable[[AnyOptions], str] | None = None,
) -> App:
    """A command with a flag for each field of a config; ``function`` returns the directory of the result.

    ``check`` is called before it, also with the names of the options that flags and the file give. With ``--dry-run``,
    ``dry_run`` is called instead of it, and what it returns is printed.
    """

    def run(
        scenario: Path | None = None,
        /,
        *,
        dry_run: Annotated[bool, Parameter(help=DRY_RUN, negative=())] = False,
        **flags: Any,
    ) -> None:
        config, given = configured(options, scenario, flags)
        # With --json, standard output holds one JSON object; what other code prints goes to standard error.
        with redirect_stdout(sys.stderr) if config.json else nullcontext():
            check(config, given)
            out = estimate(config) if dry_run and estimate else function(config)
        if isinstance(out, str):
            print(out)
        elif config.json:
            print((out / "result.json").read_text(encoding="utf-8"), end="")

    estimate = dry_run
    run.__doc__ = inspect.getdoc(function)
    app = new(function.__name__)
    app.default(with_flags(run, options, leave_out=() if dry_run else ("dry_run",)))
    return app


def configured(
    options: type[AnyOptions], scenario: Path | None, flags: Mapping[str, Any]
) -> tuple[AnyOptions, set[str]]:
    """The config by a scenario file, FEDKD_* variables and flags; and the options that file and flags give.

    Raises:
        UsageError: one of them cannot be used.

    """
    given = {key: value for key, value in flags.items() if value is not None}
    for note in variables.misspelt(os.environ):
        print(f"fedkd: {note}", file=sys.stderr)
    file, environment = from_file(scenario), variables.read(os.environ, options)
    if tables := [key for key, value in file.items() if key in ("sweep", "names") and isinstance(value, dict)]:
        raise UsageError(f"{scenario} has a table [{tables[0]}]: run it by python -m fedkd.compare {scenario}.")
    values = file | environment | given
    sources = dict.fromkeys(file, f" in {scenario}")
    sources |= {key: f" in FEDKD_{key.upper()}" for key in environment} | dict.fromkeys(given, "")
    if run := values.get("resume"):
        values = run_directory.resumed(options, Path(run), values)
    return options.parse(values, sources), {key.replace("-", "_") for key in (*file, *given)}


def with_flags(
    function: Callable[..., None],
    options: type[Options],
    names: Collection[str] | None = None,
    leave_out: Collection[str] = (),
) -> Callable[..., None]:
    """The function as a command: a scenario file, its own keywords, and a flag for each field of a config.

    ``names`` are the fields that have one, by default all; ``leave_out`` are keywords of the function without a flag.
    """
    first = Parameter(help="Scenario file (TOML) with these options as keys.", group=Group("Scenario", sort_key=0))
    hints = get_type_hints(function, include_extras=True)
    own = [
        each.replace(annotation=hints[each.name])
        for each in inspect.signature(function).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name not in leave_out
    ]
    scenario = inspect.Parameter(
        "scenario", inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=Annotated[Path | None, first]
    )
    flags = [each for each in _flags(options) if names is None or each.name in names]
    function.__signature__ = inspect.Signature([scenario, *own, *flags])  # type: ignore[attr-defined]
    function.__annotations__ = {}
    return function


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
        parameter = Parameter(
            help=field.default.description,  # type: ignore[union-attr]
            group=group,
            show_default=shown(default) or False,
            consume_multiple=1 if several else None,  # one value or more
            negative=() if default is False or several else None,
        )
        kind = tuple[str, ...] if several else hints[field.name]
        flags.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, parameter]
            )
        )
    return flags


def _converted(kind: Any, tokens: Sequence[Token]) -> Any:
    """The values as cyclopts converts them, but a fraction is no integer: it would be rounded."""
    if kind is int or int in get_args(kind):
        for token in tokens:
            if not re.fullmatch(r"[+-]?\d+", token.value):
                raise ValueError(f"{token.value!r} is not an integer")
            if len(token.value) > 4000 or int(token.value) > MAX_INTEGER:
                raise ValueError(f"{reprlib.repr(token.value)} is more than {MAX_INTEGER}")
    return convert(kind, tokens)


def shown(default: Any) -> str | None:
    """A default as ``--help`` shows it; None for an option that is off or empty by default."""
    if default in ("", (), None) or default is False:
        return None
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if default is True else str(default)
