"""Who carries the messages changes nothing; and nobody is left when a run ends, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd.core import tensors
from tests.conftest import CODED, FLAGS, ROOT, TINY, run, simulated, slow, wait_for

ray = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, check=False).returncode != 0,
    reason="Ray is not installed",
)
pytestmark = pytest.mark.xdist_group("engines")  # one at a time: Ray wants the machine for itself
SHARED = [
    "--algorithm",
    "ensemble:downlink=labels",
    "--compare",
    "fedavg",
    "--uplink-codec",
    CODED,
    "--downlink-codec",
    CODED,
]

OWN = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.tensors import put

@dataclass(frozen=True)
class Failing(Algorithm):
    how: str = ""
    mark: str = ""

    def local_update(self, setup, client, request):
        if client.id == 1 and "raise" in self.how:
            raise ZeroDivisionError("a client of mine")
        if client.id == 2 and "die" in self.how and not Path(self.mark).exists():
            Path(self.mark).touch()
            os._exit(9)
        if client.id == 1 and self.how == "hang":
            while True:
                time.sleep(1000)
        return Update({}, len(client.data)), put("model", setup.local_weights(client))
"""


@ray
@pytest.mark.slow
def test_ray_gives_the_same_bits(tmp_path):
    """Also after the command was killed, once with a checkpoint and without one."""
    out, command = tmp_path / "ray", [sys.executable, "-m", "fedkd.simulate"]
    flags = [*FLAGS, *SHARED, "--engine", "ray", "--out", out]
    with subprocess.Popen([*command, *map(str, flags)], cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: list(out.glob("checkpoint/*/checkpoint.json")))
        killed.kill()
    wait_for(lambda: not left(tmp_path))
    process = run("--resume", out, "--save", "clients", "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["status"] == "ok"
    rows = simulated(
        tmp_path / "local",
        algorithm="ensemble:downlink=labels",
        compare="fedavg",
        uplink_codec=CODED,
        downlink_codec=CODED,
        save="clients",
    )
    lines = (tmp_path / "ray" / "rounds.jsonl").read_text().splitlines()
    assert [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines] == rows
    clients = [f"clients-fedavg-seed0/client-{client}.safetensors" for client in range(3)]
    for name in ("student.safetensors", "student-fedavg-seed0.safetensors", *clients):
        assert tensors.equal(tensors.load(tmp_path / "ray" / name), tensors.load(tmp_path / "local" / name))
    wait_for(lambda: not left(tmp_path))


@ray
@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("raise+die", 0), ("hang", 4)])
def test_ray_survives_its_clients(tmp_path, how, code):
    """A client that raises is reported, one whose process dies is repeated, and one that hangs ends only the run."""
    (tmp_path / "mine.py").write_text(OWN)
    algorithm = f"{tmp_path}/mine.py:Failing:how={how},mark={tmp_path}/died"
    flags = ["--algorithm", algorithm, "--engine", "ray", "--client-cpus", len(os.sched_getaffinity(0))]
    if how == "hang":  # the others need no limit, which a slow machine would not keep
        flags += ["--client-timeout", 5]
    process = run(*FLAGS, *flags, "--out", tmp_path / "run")
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    if how == "hang":  # one actor, and it never comes back: whichever round that is, nobody replies
        assert "no reply" in result["message"]
    else:
        assert (tmp_path / "died").exists()
        assert result["runs"][0]["failures"] == 2, "of the client that raises"
    wait_for(lambda: not left(tmp_path))


@ray
@pytest.mark.slow
def test_what_ray_cannot_do_is_one_sentence(tmp_path):
    for flags, expected in (
        (["--ray-address", "127.0.0.1:1"], "cannot be reached"),
        (["--ray-address", "auto"], "no Ray runs here; start it by ray start --head"),
        (["--client-gpus", "64"], "Ray has 0 of them"),
    ):
        process = run(*FLAGS, "--engine", "ray", *flags, "--json", "--out", tmp_path / "run")
        assert process.returncode == 2
        assert expected in json.loads(process.stdout)["message"]
        assert not (tmp_path / "run").exists()


PATIENT = """
from fedkd.core import cli
from fedkd.simulate.__main__ import app
from fedkd.simulate.flower import ray_engine

ray_engine.GRACE = 240.0  # the result is written however slow the machine is
cli.run(app)
"""
ENGINES = [{"workers": "1"}, {"workers": "2"}, pytest.param({"engine": "ray"}, marks=[ray, pytest.mark.slow])]


SENT = [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGKILL, False)]  # the others are slow
SENT += [slow(number, not to_all) for number, to_all in SENT]


@pytest.mark.parametrize("engine", ENGINES, ids=["one", "two", "ray"])
@pytest.mark.parametrize(("number", "to_all"), SENT)
def test_no_process_is_left_after_a_signal(tmp_path, engine, number, to_all):
    if "engine" in engine and (to_all, number) not in ((False, signal.SIGINT), (True, signal.SIGTERM)):
        pytest.skip("it takes 20 seconds to start; test_ray_gives_the_same_bits kills it")
    out = tmp_path / "run"
    options = TINY | engine | {"rounds": 100_000, "out": out}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    start = ["-c", PATIENT] if options.get("engine") == "ray" else ["-m", "fedkd.simulate"]
    command = [sys.executable, *start, *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: (out / "rounds.jsonl").exists() or process.poll() is not None)
    (os.killpg if to_all else os.kill)(process.pid, number)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], error
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    wait_for(lambda: not left(tmp_path))


def left(tmp_path: Path) -> list[str]:
    """Processes that have to do with a run in this folder."""
    return [where.name for where in Path("/proc").glob("[0-9]*") if str(tmp_path) in _started(where)]


def _started(process: Path) -> str:
    """The command and the files a process was started with, if it is still one."""
    try:
        return (process / "cmdline").read_text() + "".join(os.readlink(file) for file in (process / "fd").iterdir())
    except OSError:
        return ""
