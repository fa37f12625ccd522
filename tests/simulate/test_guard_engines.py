"""Engines: time limits after quick rounds, memories of interrupted local updates, and exit codes."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.core import cli, run_directory
from fedkd.core.config import Config
from fedkd.core.errors import DataError, FedkdError, PluginError, RunError, StorageError, UsageError
from fedkd.simulate import simulate
from fedkd.simulate.flower import local_grid as grids
from fedkd.simulate.flower import local_update, ray_engine, workers
from fedkd.simulate.flower.local_grid import LocalGrid
from tests.conftest import is_over, simulated, tiny, wait_for

LIMIT = 3600.0  # seconds of --client-timeout, longer than any test: only `Clock` brings them about
app = ClientApp()


def asked_for(message: Message, name: str) -> str:
    return str(message.content["config"][name])


def counted(context: Context, step: int) -> int:
    """How often the client has been called, kept in its memory."""
    seen = context.state.get("seen")
    count = (int(seen["count"]) if isinstance(seen, ConfigRecord) else 0) + step
    if step:
        context.state["seen"] = ConfigRecord({"count": count})
    return count


def report(message: Message, **numbers: int) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"process": os.getpid(), **numbers})}), reply_to=message)


def hang(message: Message) -> None:
    """Never come back, unless in the process of the test, where that would be the end of it."""
    if os.getpid() == int(asked_for(message, "owner")):
        raise AssertionError("called in the process of the test")
    with open(asked_for(message, "mark"), "ab") as file:
        file.write(b".")
    while True:
        time.sleep(1000)


@app.query()
def count(message: Message, context: Context) -> Message:
    """Counts its calls; or only looks, fails after it has counted, or hangs after it has."""
    how = asked_for(message, "how")
    found = counted(context, 0 if how == "look" else 1)
    if how == "raise":
        raise ValueError("after counting")
    if how == "exit":
        raise SystemExit(3)
    if how == "hang":
        hang(message)
    return report(message, count=found)


@app.train()
def quick(message: Message, context: Context) -> Message:
    return report(message, count=0)


class DiesOnce(local_update.ClientRunner):
    """The process of client 1 dies in its second round, after it has written its new memory, before the reply."""

    def run(self, message: Message, client: int) -> Message:
        reply = super().run(message, client)
        mark = self.memories / "died"
        if client == 1 and message.metadata.group_id.endswith("/2") and not mark.exists():
            mark.touch()
            os._exit(9)
        return reply


@pytest.fixture
def asked(tmp_path):
    """The content of a message, by what the client is to do."""

    def content(how: str) -> RecordDict:
        record = {"how": how, "owner": str(os.getpid()), "mark": str(tmp_path / "mark")}
        return RecordDict({"config": ConfigRecord(record)})

    return content


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Seen from the grid, more than `LIMIT` seconds pass each time a client starts to hang, and none else."""
    mark = tmp_path / "mark"

    def monotonic() -> float:
        return 2 * LIMIT * (mark.stat().st_size if mark.exists() else 0)

    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(workers, "MAX_WAIT", 0.05)  # look at the clock that often
    return monotonic


def ask(grid: LocalGrid, kind: str, content: RecordDict, *nodes: int) -> list[Message]:
    return list(grid.send_and_receive([grid.create_message(content, kind, node, "1") for node in nodes]))


def processes(replies: list[Message]) -> set[int]:
    return {int(reply.content["metrics"]["process"]) for reply in replies}


# --- quick rounds


def test_a_client_that_hangs_after_a_quick_round_is_ended(asked, clock, monkeypatch):
    """However quick rounds were, where there is a time limit no client is called in the process of the server."""
    monkeypatch.setattr(grids, "SMALL", 10.0**9)
    with LocalGrid(app, 2, {}, workers=1, timeout=LIMIT, fork=True) as grid:
        for _ in range(2):
            assert os.getpid() not in processes(ask(grid, "query", asked("count"), 1, 2))
        (reply,) = ask(grid, "query", asked("hang"), 1)
        assert reply.has_error()
        assert reply.error.reason == "the process of this client took longer than --client-timeout, twice"
        (after,) = ask(grid, "query", asked("count"), 1)
        assert after.content["metrics"]["count"] == 3


def test_quick_rounds_of_a_kind_go_on_in_this_process_until_one_is_not_quick(asked, monkeypatch):
    here = os.getpid()
    monkeypatch.setattr(grids, "SMALL", 10.0**9)
    with LocalGrid(app, 3, {}, workers=2, fork=True) as grid:
        assert here not in processes(ask(grid, "query", asked("count"), 1, 2))
        assert here not in processes(ask(grid, "train", asked("count"), 1, 2))  # another kind of message
        again = ask(grid, "query", asked("count"), 1, 2, 3)
        assert processes(again) == {here}
        assert [reply.content["metrics"]["count"] for reply in again] == [2, 2, 1]  # memories are those of before
        monkeypatch.setattr(grids, "SMALL", 0.0)
        assert processes(ask(grid, "query", asked("count"), 1)) == {here}  # which turns out not to be quick
        (last,) = ask(grid, "query", asked("count"), 1)
        assert last.content["metrics"]["process"] != here
        assert last.content["metrics"]["count"] == 4
        assert processes(ask(grid, "train", asked("count"), 1)) == {here}  # the other kind still was


@pytest.mark.parametrize(("seconds", "is_here"), [(2.9, True), (3.0, False), (3.1, False)])
def test_quick_is_less_than_so_many_seconds_a_client(asked, monkeypatch, seconds, is_here):
    """Three clients at one second each."""
    ticks = iter([100.0, 100.0 + seconds, 200.0, 200.0])
    monkeypatch.setattr(grids, "SMALL", 1.0)
    monkeypatch.setattr(grids, "time", SimpleNamespace(perf_counter=lambda: next(ticks), time=time.time))
    with LocalGrid(app, 3, {}, workers=2, fork=True) as grid:
        ask(grid, "query", asked("count"), 1, 2, 3)
        assert (processes(ask(grid, "query", asked("count"), 1)) == {os.getpid()}) is is_here


def test_one_worker_without_a_time_limit_is_this_process(asked):
    with LocalGrid(app, 2, {}, workers=1) as grid:
        assert processes(ask(grid, "query", asked("count"), 1, 2)) == {os.getpid()}


# --- memories


def look(grid: LocalGrid, asked, node: int = 1) -> int:
    """What the client remembers; to look changes nothing."""
    (reply,) = ask(grid, "query", asked("look"), node)
    return int(reply.content["metrics"]["count"])


def test_a_local_update_that_is_repeated_after_it_was_written_gives_the_same_bits(tmp_path, monkeypatch):
    """It starts from the memory that the message names, not from the newest."""
    whole = simulated(tmp_path / "whole", algorithm="scarlet", rounds=3)
    monkeypatch.setattr(grids, "ClientRunner", DiesOnce)
    assert simulated(tmp_path / "cut", algorithm="scarlet", rounds=3, workers=2) == whole
    assert (tmp_path / "cut" / "checkpoint" / "died").exists()


@pytest.mark.parametrize("how", ["raise", "exit"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_client_that_fails_after_counting_has_the_old_memory(asked, count, how):
    with LocalGrid(app, 2, {}, workers=count, fork=True) as grid:
        ask(grid, "query", asked("count"), 1, 2)
        (reply,) = ask(grid, "query", asked(how), 1)
        assert reply.has_error()
        assert look(grid, asked) == 1
        assert look(grid, asked, 2) == 1


def test_each_client_has_one_file_which_changes_at_once(asked, tmp_path, monkeypatch):
    folder = tmp_path / "memories"
    folder.mkdir()
    runner, other = local_update.ClientRunner(app, 2, {}, folder), LocalGrid(app, 2, {})

    def call(how: str, client: int = 0) -> Message:
        return runner.run(other.create_message(asked(how), "query", client + 1, "1"), client)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    call("count")
    first = files()
    assert set(first) == {"1"}
    call("look")
    assert call("raise").has_error()
    assert files() == first, "neither a look nor a failure changes it"
    call("count", 1)
    assert files() == {**first, "2": first["1"]}

    # Power is lost while the new memory is written: the old one is whole, and what was begun does no harm.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call("count")
    assert files()["1"] == first["1"]
    assert call("count").content["metrics"]["count"] == 2
    assert set(files()) == {"1", "2"}


# --- exit codes


ERRORS = [UsageError("a"), DataError("no data."), RunError("c"), PluginError("d"), StorageError("e"), FedkdError("f")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error.code))
def test_the_error_that_ended_a_run_is_read_as_recorded(tmp_path, error):
    run_directory.record_failure(tmp_path, error)
    held = json.loads((tmp_path / "result.json").read_text())
    assert held == {"status": "failed", "out": str(tmp_path), "code": error.code, "message": str(error)}
    found = run_directory.read_failure(tmp_path)
    assert isinstance(found, FedkdError)
    assert (found.code, str(found)) == (error.code, str(error))
    assert FedkdError.code == 1, "the class is left as it is"


def test_what_a_result_holds_already_stays(tmp_path):
    held = {"status": "interrupted", "out": "elsewhere", "runs": [{"rounds": 3}], "code": 2, "message": "old"}
    run_directory.write_json(tmp_path / "result.json", held)
    run_directory.record_failure(tmp_path, RunError("new"))
    assert json.loads((tmp_path / "result.json").read_text()) == {**held, "code": 4, "message": "new"}


def test_a_result_without_a_code_is_no_failure(tmp_path):
    assert run_directory.read_failure(tmp_path) is None
    run_directory.write_json(tmp_path / "result.json", {"status": "failed", "message": "no code"})
    assert run_directory.read_failure(tmp_path) is None


CHILD = """#!/bin/sh
[ "$1 $2" = "-m fedkd.simulate.flower.ray_engine" ] || exit 99
cd "$3" || exit 98
{script}
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A run whose engine is a shell script, and how the command ends with it."""
    out = tmp_path / "run"
    out.mkdir()

    def engine(script: str) -> Path:
        path = tmp_path / "child"
        path.write_text(CHILD.format(script=script))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))
        ray_engine.run(tiny(engine="ray", out=str(out)))
        return out

    engine.out = out
    return engine


def test_an_engine_that_ends_well_raises_nothing(child):
    assert (child("pwd > where") / "where").read_text().strip() == str(child.out.resolve())
    run_directory.record_failure(child.out, RunError("of old"))
    child("exit 0")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error.code))
def test_what_ended_the_engine_ends_the_command(child, error):
    """By its own code and words, whatever the engine itself ends with."""
    run_directory.record_failure(child.out, error)
    for ends in (error.code, 1, 74):
        with pytest.raises(FedkdError) as raised:
            child(f"exit {ends}")
        assert (raised.value.code, str(raised.value)) == (error.code, str(error))


def test_an_engine_without_a_recorded_error_failed_or_could_not_write(child):
    run_directory.write_json(child.out / "result.json", {"status": "failed"})
    log = child.out / "ray.log"
    for script, kind, expected in (
        ("exit 1", RunError, f"Flower's simulation ended with 1; its log is {log}."),
        ("exit 73", RunError, "ended with 73"),
        ("kill -9 $$", RunError, "ended with -9"),
        ("exit 74", StorageError, f"A file could not be written; see {log}."),
    ):
        with pytest.raises(FedkdError) as raised:
            child(script)
        assert type(raised.value) is kind
        assert expected in str(raised.value)
    assert (RunError.code, StorageError.code) == (4, 74)


@pytest.mark.parametrize(
    ("error", "keeps"), [(DataError("no such data."), False), (RunError("nobody answered."), True)]
)
def test_the_command_exits_with_what_ended_the_engine(child, tmp_path, monkeypatch, capfd, error, keeps):
    """The code of a run that could not go on keeps its directory; any other frees the name."""
    out, text = tmp_path / "new", json.dumps({"status": "failed", "code": error.code, "message": str(error)})
    child("exit 0")  # makes the script the interpreter
    (tmp_path / "child").write_text(CHILD.format(script=f"echo '{text}' > result.json; exit {error.code}"))
    monkeypatch.setattr(sys, "argv", ["fedkd", "--engine", "ray", "--dataset", "digits", "--json", "--out", str(out)])
    with pytest.raises(SystemExit) as raised:
        cli.run(cli.command(simulate, Config))
    assert raised.value.code == error.code
    shown = capfd.readouterr()
    assert json.loads(shown.out) == {"status": "error", "code": error.code, "message": str(error)}
    assert f"fedkd: {error}\n" in shown.err
    assert out.exists() is keeps


def test_no_process_of_the_engine_outlives_it(child):
    """Also not what runs beside it when it ends."""
    child("sleep 100000 >/dev/null 2>&1 & echo $! > beside")
    beside = Path("/proc", (child.out / "beside").read_text().strip(), "stat")
    if sys.platform.startswith("linux"):
        wait_for(lambda: is_over(beside))


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_passed_on_and_the_engine_may_write_what_it_has(child, monkeypatch, ends):
    """And it is the interrupt that ends the command, with whatever code the engine ends."""

    def interrupted(*_: object) -> None:
        wait_for((child.out / "ready").exists)
        raise ends

    monkeypatch.setattr(ray_engine.os, "waitid", interrupted)
    monkeypatch.setattr(ray_engine, "GRACE", 120.0)
    with pytest.raises(ends):
        child("trap 'echo done > wrote; exit 4' INT; : > ready; while :; do sleep 0.1; done")
    assert (child.out / "wrote").read_text() == "done\n"


# --- what the engine's process itself prints, and its exit code


def forked(out: Path, error: BaseException | None, monkeypatch) -> int:
    """The exit status of the engine's process, in which playing ends with an error."""
    config = tiny(engine="ray", out=str(out))

    def play(config: Config) -> None:
        assert config == tiny(engine="ray", out=str(out), json=True)
        if error is not None:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "_run", play)
        patch.setattr(sys, "argv", ["fedkd", str(out), json.dumps(config.run_config())])
        if not (pid := os.fork()):
            os.setsid()  # so that it ends nobody but itself when this process is gone
            try:
                ray_engine.main()
            finally:
                os._exit(97)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error.code))
def test_the_engine_notes_what_ended_it_and_ends_with_its_code(tmp_path, monkeypatch, error):
    assert forked(tmp_path, error, monkeypatch) == error.code
    found = run_directory.read_failure(tmp_path)
    assert (found.code, str(found)) == (error.code, str(error))


def test_a_full_disk_is_recorded_as_such(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "student.safetensors")
    assert forked(tmp_path, full, monkeypatch) == 74
    found = run_directory.read_failure(tmp_path)
    assert (found.code, str(found)) == (74, "No space left on device: student.safetensors.")


@pytest.mark.parametrize(("error", "code"), [(None, 0), (KeyboardInterrupt(), 130), (ZeroDivisionError("x"), 1)])
def test_an_engine_that_ends_otherwise_notes_nothing(tmp_path, monkeypatch, error, code):
    assert forked(tmp_path, error, monkeypatch) == code
    assert run_directory.read_failure(tmp_path) is None
