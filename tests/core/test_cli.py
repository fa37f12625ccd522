"""Commands: subcommands of the console script, near misses, misspelt environment variables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib

import pytest

from fedkd import __version__
from fedkd.core import cli, variables
from fedkd.core.catalog import CATALOG
from fedkd.list import component
from tests.conftest import FLAGS, ROOT, run, slow


def fedkd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script, without installing it."""
    code = "import sys; sys.argv[0] = 'fedkd'; from fedkd.core.cli import fedkd; fedkd()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment or None, check=False)


def test_the_console_script_is_declared_and_has_all_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fedkd": "fedkd.core.cli:fedkd"}
    shown = fedkd("--help").stdout
    assert all(name in shown for name in cli.COMMANDS)
    assert "--install-completion" in shown


def options_of(shown: str) -> list[str]:
    """The lines of a help text that describe options and arguments."""
    ours = [line for line in shown.splitlines() if line.startswith("│")]
    return [line for line in ours if "--help" not in line and "--version" not in line]


@pytest.mark.parametrize(
    "name", ["simulate", "distill", *map(slow, sorted(cli.COMMANDS.keys() - {"simulate", "distill"}))]
)
def test_a_subcommand_is_the_module_of_that_name(name):
    module = subprocess.run(
        [sys.executable, "-m", f"fedkd.{name}", "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    subcommand = fedkd(name, "--help")
    assert module.returncode == subcommand.returncode == 0
    # The panel with --help alone is left out of a subcommand.
    assert options_of(module.stdout) == options_of(subcommand.stdout) != []
    assert module.stdout.startswith(f"Usage: python -m fedkd.{name} ")


@pytest.mark.parametrize(
    ("option", "suggested"),
    [
        ("--lr", "--learning-rate"),
        ("--clinets", "--clients"),
        ("--votes", "--weighting"),
        ("--num-clients", "--clients"),
    ],
)
def test_a_near_miss_is_suggested(option, suggested):
    done = fedkd("simulate", option, "3")
    assert done.returncode == 2
    assert f"Did you mean {suggested}?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_misspelt_variable_is_reported_once_and_others_are_not():
    known = {"FEDKD_ROUNDS": "1", "FEDKD_CACHE": "x", "FEDKD_DATA": "x", "FEDKD_TEACHER_EPOCHS": "1", "HOME": "/"}
    assert variables.misspelt(known) == []
    (note,) = variables.misspelt({**known, "FEDKD_ROUND": "1"})
    assert "FEDKD_ROUND is ignored" in note
    assert "did you mean FEDKD_ROUNDS?" in note
    (note,) = variables.misspelt({"FEDKD_QWERTYUIOP": "1"})
    assert "did you mean" not in note


def test_every_component_is_listed_with_a_line_and_its_options():
    listed = json.loads(fedkd("list", "--json").stdout)
    assert {(one["kind"], one["name"]) for one in listed} == {
        (kind, name) for kind in CATALOG for name in CATALOG[kind]
    }
    assert all(one["summary"] for one in listed)
    sourced = [one for one in listed if one["kind"] in ("aggregator", "loss", "algorithm")]
    assert [one["name"] for one in sourced if not one["source"]] == OURS
    dsfl = next(one for one in listed if one["name"] == "dsfl")
    assert {option["name"]: option["default"] for option in dsfl["options"]} == {
        "downlink": "labels",
        "local-distill-epochs": "1",
        "aggregation": "era",
        "temperature": "0.1",
    }


#: Components without a paper.
OURS = ["local", "central", "entropy", "mse"]


def test_options_have_types_in_words():
    options = {option.name: option for option in component("algorithm", "dsfl").options}
    assert options["aggregation"].type == "era|sa"
    assert options["temperature"].type == "number"
    (name,) = [option for option in component("dataset", "folder").options if option.required]
    assert name.name.isupper()


def test_an_unknown_kind_is_one_sentence():
    done = fedkd("list", "algorithms")
    assert done.returncode == 2
    assert "Did you mean 'algorithm'?" in done.stderr


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("simulate", ["--clients", "1.5"]),
        ("simulate", ["--seed", "1e3"]),
        ("bench", ["--rounds", "2.0"]),
        ("export", ["RUN", "--images", "0x10"]),
        ("distill", ["--epochs", "2.5"]),
    ],
)
def test_a_fraction_is_no_integer(name, flags):
    """It is not rounded."""
    done = fedkd(name, *flags)
    assert done.returncode == 2
    assert f"{flags[-2]}: {flags[-1]!r} is not an integer" in done.stderr


def test_a_list_shows_defaults_as_specs_and_what_is_optional():
    partitioners, terms = (fedkd("list", kind).stdout for kind in ("partitioner", "distillation"))
    assert "pathological:classes=2,mode=first-deterministic" in partitioners
    assert "size:sizes=text\n" in partitioners
    assert "logits:kind=kl,temperature=4.0,[weight=number]," in terms
    assert "step:milestones=integer+...,gamma=0.1" in fedkd("list", "schedule").stdout
    assert "multi-level:temperatures=2.0+3.0+4.0+5.0+6.0," in fedkd("list", "loss").stdout


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_every_command_has_its_version(name):
    done = fedkd(*([name] if name else []), "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fedkd {__version__}\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
@pytest.mark.parametrize(
    ("arguments", "is_joined"),
    [
        (["list"], False),
        (["list", "--json"], True),
        (["--version"], True),
    ],
)
def test_without_a_reader_a_command_ends_quietly(arguments, is_joined):
    """As other tools with ``| head``; also with standard error in the same pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; sys.argv[0] = 'fedkd'; from fedkd.core.cli import fedkd; fedkd()"
    error = subprocess.STDOUT if is_joined else subprocess.PIPE
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=writing, stderr=error, cwd=ROOT, text=True) as process:
        os.close(writing)
        assert process.wait(240) == 141
        assert is_joined or process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("number", "code", "shown"),
    [(signal.SIGINT, 130, "fedkd: interrupted.\n"), (signal.SIGTERM, 143, "fedkd: terminated.\n")],
)
@pytest.mark.parametrize("module", ["pydantic", "fedkd.core.cli", "fedkd.simulate.experiment", "torch"])
def test_a_signal_while_modules_are_imported_is_one_line(tmp_path, module, number, code, shown):
    """Sent by the process itself, several times, at the start of the import of a module."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Sender:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == '{module}':\n"
        "            sys.meta_path.remove(self)\n"
        f"            for _ in range(3): os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Sender())\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run(*FLAGS, "--out", tmp_path / "out", PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (code, shown)
    assert not (tmp_path / "out").exists()


def test_signals_after_the_first(capsys, monkeypatch):
    """SIGTERM is ignored while what is open is closed; Ctrl-C ends the process at once."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ended = []
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    app = cli.new("x")

    @app.default
    def wait() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for _ in range(8):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(SystemExit) as raised:
            cli.run(app, [])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (raised.value.code, ended, capsys.readouterr().err) == (143, [130], "fedkd: terminated.\n")
