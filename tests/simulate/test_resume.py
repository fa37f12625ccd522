"""Resuming a run: the same bits as without an interruption, for every method and after any kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.core import run_directory, tensors
from fedkd.core.catalog import CATALOG
from fedkd.core.config import Config
from fedkd.core.errors import DataError, ResumeError, UsageError
from fedkd.simulate import checkpoint, simulate
from tests.conftest import QUICK, ROOT, TINY, is_interrupted_after, tiny, wait_for
from tests.forked import Forked

SMALL = {"dataset": "noise:size=200,pixels=8", "participation": 0.6, "partitioner": "linear"}
MEMORIES = "fedmd fedavg cfd scarlet scaffold"  # client memory, none, channel memory, a cache, control variates
METHODS = [
    *(QUICK.get(name, name) for name in sorted(CATALOG["algorithm"])),
    "ensemble:downlink=labels",
    "ensemble:downlink=student",
]


def result_of(out: Path) -> dict[str, object]:
    """Everything that must not depend on interruptions: rows and summaries without times, and students."""

    def timeless(row: dict) -> dict:
        return {key: value for key, value in row.items() if "seconds" not in key}

    result = json.loads((out / "result.json").read_text())
    return {
        "rows": [timeless(json.loads(line)) for line in (out / "rounds.jsonl").read_text().splitlines()],
        "runs": [timeless(run) for run in result["runs"]],
        "status": result["status"],
        "students": {path.name: tensors.digest(tensors.load(path)) for path in sorted(out.glob("*.safetensors"))},
        "confusion": {path.name: path.read_text() for path in sorted(out.glob("*.csv"))},
    }


def resume(out: Path, **changes: object) -> Path:
    """``--resume``, in this process."""
    given = {"resume": str(out), **changes}
    return simulate(Config.parse(run_directory.resumed(Config, out, given)))


@pytest.mark.parametrize("method", METHODS)
def test_one_round_extended_to_two_is_two_rounds(tmp_path, method):
    options = {"algorithm": method, "uplink-codec": "float16:delta=true", **SMALL}
    simulate(tiny(**options, rounds=2, out=str(tmp_path / "whole")))
    simulate(tiny(**options, rounds=1, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=2)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_several_methods_and_seeds_are_extended_in_the_order_of_a_whole_run(tmp_path):
    options = {"algorithm": "local", "compare": "ensemble fedavg", "seeds": 2, **SMALL}
    simulate(tiny(**options, rounds=3, out=str(tmp_path / "whole")))
    simulate(tiny(**options, rounds=1, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=3)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")
    again = result_of(resume(tmp_path / "parts"))
    assert again == result_of(tmp_path / "whole"), "nothing is left to do"


@pytest.mark.parametrize("every", [2, 3])
def test_rounds_after_the_last_checkpoint_are_repeated(tmp_path, every):
    """The state of the directory right after round 4 or 5, when only round 2, 3 or 4 has a checkpoint."""
    options = {"algorithm": "fedmd", "compare": "scarlet", "checkpoint-every": every, **SMALL}
    simulate(tiny(**options, rounds=6, out=str(tmp_path / "whole")))
    out = tmp_path / "parts"
    broken = Config.parse({**tiny(**options, rounds=6, out=str(out)).run_config()})
    stop_after(broken, 5)
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 5
    resume(out)
    assert result_of(out) == result_of(tmp_path / "whole")


def stop_after(config: Config, rounds: int) -> None:
    """Run until the line of a round is written, and no further."""
    assert is_interrupted_after(rounds, lambda: simulate(config))


def rows_of(out: Path) -> int:
    """The number of finished rounds."""
    file = out / "rounds.jsonl"
    return len(run_directory.rows(file)) if file.exists() else 0


def command(name: str, flags: list[str]) -> subprocess.Popen:
    """``python -m fedkd.NAME FLAGS`` without its standard output."""
    return subprocess.Popen([sys.executable, "-m", f"fedkd.{name}", *flags], cwd=ROOT, stdout=subprocess.DEVNULL)


def killed_and_resumed(start: Callable, out: Path, kills: int, workers: str) -> None:
    """Start a run, kill it with SIGKILL at random times, and resume it each time; then let it end."""
    source = random.Random(kills)
    first, *others = MEMORIES.split()
    options = {"algorithm": first, "clients": 4, "rounds": 6, "workers": workers, "out": out, **SMALL}
    flags = [part for key, value in (TINY | options).items() for part in (f"--{key}", str(value))]
    flags += ["--compare", *others]
    for kill in range(kills + 1):
        process = start("simulate", ["--resume", str(out)] if kill else flags)
        if kill == kills:
            assert process.wait(240) == 0
            return
        before = rows_of(out) if kill else 0
        wait_for(lambda: rows_of(out) > before or process.poll() is not None)  # noqa: B023
        time.sleep(source.uniform(0, 0.2))
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("start", "workers", "kills"), [(command, "1", 2), (Forked, "2", 5)])
def test_a_run_that_was_killed_has_the_bits_of_one_that_was_not(tmp_path, start, workers, kills):
    first, *others = MEMORIES.split()
    options = {"algorithm": first, "compare": " ".join(others), "clients": 4, "rounds": 6, **SMALL}
    simulate(tiny(**options, out=str(tmp_path / "whole")))
    killed_and_resumed(start, tmp_path / "killed", kills, workers)
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    assert not (tmp_path / "killed" / "lock").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return simulate(tiny(algorithm="fedmd", **SMALL, out=str(out)))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_options_that_change_results_may_not_differ(copied):
    for option, value in {"learning_rate": 0.5, "clients": 4, "algorithm": "local", "proxy": "holdout:size=30"}.items():
        with pytest.raises(ResumeError, match=f"--{option.replace('_', '-')} .* differs from the run in .*run, which"):
            resume(copied, **{option: value})
    with pytest.raises(ResumeError, match="fedmd has 2 rounds already"):
        resume(copied, rounds=1)
    before = result_of(copied)
    resume(copied, workers="2", learning_rate=0.01)  # as recorded
    assert result_of(copied) == before


def test_rounds_may_not_differ_if_learning_rates_depend_on_them(tmp_path):
    out = simulate(tiny(algorithm="local", schedule="cosine", **SMALL, out=str(tmp_path / "run")))
    with pytest.raises(ResumeError, match=r"--rounds 9 .*has 2 \(the learning rate of each round depends on it\)"):
        resume(out, rounds=9)


def test_a_directory_without_a_run_cannot_be_resumed(tmp_path):
    command = [sys.executable, "-m", "fedkd.simulate", "--resume", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == ResumeError.code
    assert f"{tmp_path} is not the directory of a run" in done.stderr


def damaged(folder: Path, how: str) -> None:
    (state,) = folder.glob("state-*.safetensors")
    about = folder / "checkpoint.json"
    if how == "bits":
        content = bytearray(state.read_bytes())
        content[-3] ^= 1
        state.write_bytes(bytes(content))
    elif how == "no state":
        state.unlink()
    elif how == "no memory":
        (folder / "1").unlink()
    elif how == "text":
        about.write_text(about.read_text()[:20])
    else:
        about.write_text(json.dumps({**json.loads(about.read_text()), "format": 0}))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("bits", "checksum"),
        ("no state", "a file is missing"),
        ("no memory", "client memories are missing"),
        ("text", "is damaged"),
        ("format", "another version"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(copied, how, expected):
    folder = checkpoint.folder_of(copied, tiny(algorithm="fedmd"))
    damaged(folder, how)
    rows = (copied / "rounds.jsonl").read_text()
    with pytest.raises(DataError, match=expected):
        resume(copied, rounds=4)
    assert (copied / "rounds.jsonl").read_text() == rows


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_of_a_checkpoint_is_refused_or_changes_nothing(finished, tmp_path_factory, data):
    """Flipped bytes, truncations and edited JSON; nothing is written before it is noticed."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("changed") / "run")
    config = tiny(algorithm="fedmd", **SMALL)
    whole = checkpoint.load(out, config)
    path = data.draw(st.sampled_from(sorted(checkpoint.folder_of(out, config).iterdir())))
    changed(path, data)
    try:
        found = checkpoint.load(out, config)
    except (DataError, ResumeError) as error:
        assert str(out) in str(error)  # noqa: PT017
        rows = (out / "rounds.jsonl").read_bytes()
        with pytest.raises(type(error)):
            resume(out, rounds=4)
        assert (out / "rounds.jsonl").read_bytes() == rows
    else:
        assert (found.number, found.memories) == (whole.number, whole.memories)
        assert tensors.equal(found.progress.state, whole.progress.state)


def changed(path: Path, data: st.DataObject) -> None:
    """Change a file in a way that is drawn."""
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["flip", "truncate"] + ["edit"] * (path.suffix == ".json")))
    if how == "truncate":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif how == "flip":
        place = data.draw(st.integers(0, len(content) - 1))
        flip = data.draw(st.integers(1, 255))
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
    else:
        about = json.loads(content)
        key = data.draw(st.sampled_from(sorted(about)))
        values = st.sampled_from([None, 0, 1, -1, 10**9, "", "x", [], {}, {"0": 1}, about.get("memories")])
        path.write_text(json.dumps({**about, key: data.draw(values)}))


def test_a_scenario_file_that_was_edited_is_noticed(copied):
    rows, text = (copied / "rounds.jsonl").read_text(), (copied / "config.toml").read_text()
    for old, new, expected in (
        ("learning-rate = 0.01", "learning-rate = 0.02", "was written with --learning-rate 0.01, not 0.02"),
        ('algorithm = "fedmd"', 'algorithm = "dsfl"', "is of a method or seed that .*config.toml does not name"),
    ):
        assert old in text
        (copied / "config.toml").write_text(text.replace(old, new))
        with pytest.raises(ResumeError, match=expected):
            resume(copied)
        assert (copied / "rounds.jsonl").read_text() == rows


def test_a_damaged_line_is_reported(copied):
    file = copied / "rounds.jsonl"
    file.write_bytes(b'{"\xff' + file.read_bytes()[3:])
    with pytest.raises(DataError, match=r"rounds.jsonl is damaged in line 1"):
        resume(copied)


def test_a_run_without_rounds_that_cannot_be_resumed_stays(copied):
    """It was killed in its first round: there are client memories, and no row yet."""
    (copied / "rounds.jsonl").unlink()
    for file in copied.glob("checkpoint/*/*.json"):
        file.unlink()
    with pytest.raises(UsageError):
        resume(copied, device="cuda:99")
    assert (copied / "config.toml").exists()


def test_a_resume_on_another_machine_says_so(copied, capsys):
    resume(copied)
    assert "other versions or hardware" not in capsys.readouterr().out
    environment = json.loads((copied / "env.json").read_text())
    (copied / "env.json").write_text(json.dumps({**environment, "processor": "another", "cores": 999}))
    resume(copied)
    assert "notice  The run began with other versions or hardware (processor), so the last" in capsys.readouterr().out
    (copied / "env.json").write_text("{")
    with pytest.raises(DataError, match=r"env\.json is damaged"):
        resume(copied)


def test_a_run_keeps_its_precision(copied, capsys):
    """It is the one that ``auto`` was, on the device that the run had."""
    environment = json.loads((copied / "env.json").read_text())
    assert environment["precision"] == "float32"
    resume(copied, precision="float32")
    assert "device  cpu, float32" in capsys.readouterr().out
    (copied / "env.json").write_text(json.dumps({**environment, "precision": "tf32"}))
    rows = (copied / "rounds.jsonl").read_text()
    with pytest.raises(ResumeError, match=r"began in tf32 and would continue in float32; add --precision tf32"):
        resume(copied, rounds=4)
    with pytest.raises(UsageError, match="--precision tf32 cannot be used on cpu"):
        resume(copied, rounds=4, precision="tf32")
    assert (copied / "rounds.jsonl").read_text() == rows
    del environment["precision"]  # of a run before there was one
    (copied / "env.json").write_text(json.dumps(environment))
    resume(copied, rounds=4)


@pytest.mark.parametrize(
    ("old", "new"), [('"evaluation_seconds"', '"evaluation_secands"'), ('"test_accuracy": 0.', '"test_accuracy": 0.9')]
)
def test_rows_that_were_changed_are_refused(copied, old, new):
    file = copied / "rounds.jsonl"
    changed = file.read_text().replace(old, new, 1)
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(DataError, match=r"rows of .* have changed"):
        resume(copied, rounds=4)
    assert file.read_text() == changed


def test_a_torn_last_line_is_repaired(copied):
    whole = result_of(copied)["rows"]
    with (copied / "rounds.jsonl").open("a") as file:
        file.write('{"algorithm": "fedmd", "se')
    resume(copied)
    assert result_of(copied)["rows"] == whole


def test_rounds_that_are_missing_are_reported(copied):
    lines = (copied / "rounds.jsonl").read_text().splitlines(keepends=True)
    (copied / "rounds.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match="lacks rounds of fedmd"):
        resume(copied)


def test_a_run_in_use_is_refused_and_a_lock_of_a_dead_process_is_not(copied):
    holder = "import sys, time\nfrom pathlib import Path\nfrom fedkd.core.run_directory import lock\n"
    holder += "lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holder, str(copied)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match=f"in use by process {process.pid} on "):
            resume(copied)
        process.kill()
    assert (copied / "lock").exists()
    resume(copied)
    assert not (copied / "lock").exists()


def test_a_directory_with_a_run_is_refused_with_its_status(copied):
    with pytest.raises(UsageError, match=r"it holds a run \(ok\). Continue it by --resume "):
        simulate(tiny(out=str(copied)))
    os.unlink(copied / "result.json")
    with pytest.raises(UsageError, match=r"it holds a run \(not finished\)"):
        simulate(tiny(out=str(copied)))


def test_what_has_no_checkpoint_is_refused_and_stays(copied):
    shutil.rmtree(copied / "checkpoint")
    before = result_of(copied)
    with pytest.raises(ResumeError, match="has no checkpoint; start the run again"):
        resume(copied, rounds=4)
    assert result_of(copied) == before


def test_without_checkpoints_nothing_is_kept(tmp_path):
    out = simulate(tiny(algorithm="fedmd", **SMALL, checkpoint_every=0, out=str(tmp_path / "run")))
    assert not (out / "checkpoint").exists()
    assert not (out / "memories").exists()


def test_a_run_that_is_resumed_without_further_checkpoints_keeps_client_memories(tmp_path):
    options = {"algorithm": "fedmd", **SMALL}
    simulate(tiny(**options, rounds=4, out=str(tmp_path / "whole")))
    simulate(tiny(**options, rounds=2, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=4, checkpoint_every=0)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")
