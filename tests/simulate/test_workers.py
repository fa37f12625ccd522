"""Several processes: the same bits, and what happens when one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkd.core import tensors
from fedkd.simulate.flower import workers as pool
from fedkd.simulate.flower.local_grid import LocalGrid, count_workers
from tests.conftest import CODED, ROOT, is_over, simulated, slow, wait_for

DROPPING = """
from torch import nn

def dropping(*, classes: int):
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, classes))
"""


@pytest.mark.parametrize("model", ["{own}:dropping", slow("cnn:width=8")])
def test_the_number_of_workers_changes_no_bit(tmp_path, model):
    """Two and three processes against one, for a model without and with dropout."""
    (tmp_path / "models.py").write_text(DROPPING)
    model = model.replace("{own}", f"{tmp_path}/models.py")
    results = {}
    for workers in ("1", "2", "3") if "cnn" in model else ("1", "2"):
        changes = {
            "algorithm": "ensemble:downlink=labels",
            "clients": 5,
            "uplink_codec": CODED,
            "downlink_codec": CODED,
        }
        rows = simulated(tmp_path / workers, workers=workers, model=model, **changes)
        results[workers] = rows, tensors.digest(tensors.load(tmp_path / workers / "student.safetensors"))
    assert len({str(result) for result in results.values()}) == 1


app = ClientApp()


@app.query()
def dying(message: Message, context: Context) -> Message:
    """Dies when it is asked to, once for each file it finds, or always."""
    path = Path(str(message.content["config"]["path"]))
    if context.node_config["partition-id"] == 1 and path.exists():
        if path.name == "once":
            path.unlink()
        os._exit(9)
    return Message(RecordDict({"metrics": MetricRecord({"count": 1})}), reply_to=message)


@pytest.mark.parametrize("name", ["once", "always"])
def test_a_worker_that_dies_is_replaced_and_its_client_repeated(tmp_path, name):
    (tmp_path / name).touch()
    asked = RecordDict({"config": ConfigRecord({"path": str(tmp_path / name)})})
    with LocalGrid("tests.simulate.test_workers:app", 2, {}, workers=2) as grid:
        for _ in range(2):
            replies = list(grid.send_and_receive([grid.create_message(asked, "query", node, "1") for node in (1, 2)]))
            assert len(replies) == 2
            failed = [reply.error.reason for reply in replies if reply.has_error()]
            if name == "once":
                assert not failed
            else:
                assert "died, twice" in str(failed)
    wait_for(lambda: not multiprocessing.active_children())


def test_how_many_workers():
    cores = count_workers("auto", 1000, 1, "cpu")
    assert cores == len(os.sched_getaffinity(0))
    assert count_workers("auto", 1000, cores, "cpu") == 1
    assert count_workers("auto", 1, 1, "cpu") == 1
    assert count_workers("auto", 20, 1, "cuda") == 1
    assert count_workers("80", 2, 1, "cpu") == 2
    assert count_workers("7", 20, 1, "cpu") == 7


@app.train()
def hanging(message: Message, context: Context) -> Message:
    if context.node_config["partition-id"] == 1:
        with open(str(message.content["config"]["path"]), "ab") as file:
            file.write(b".")
        while True:
            time.sleep(1000)
    return Message(RecordDict({"metrics": MetricRecord({"count": 1})}), reply_to=message)


def test_a_local_update_that_hangs_is_ended_and_the_others_continue(tmp_path, monkeypatch):
    """The hour it is given is over, seen from the grid, as soon as it hangs."""
    mark = tmp_path / "hangs"
    clock = SimpleNamespace(monotonic=lambda: 7200.0 * (mark.stat().st_size if mark.exists() else 0))
    monkeypatch.setattr(pool, "time", clock)
    monkeypatch.setattr(pool, "MAX_WAIT", 0.05)  # seconds between looks at the clock
    asked = RecordDict({"config": ConfigRecord({"path": str(mark)})})
    with LocalGrid("tests.simulate.test_workers:app", 3, {}, workers=1, timeout=3600) as grid:
        messages = [grid.create_message(asked, "train", node, "1") for node in (1, 2, 3)]
        replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    assert [replies[node].has_error() for node in (1, 2, 3)] == [False, True, False]
    assert "--client-timeout, twice" in replies[2].error.reason
    assert mark.read_bytes() == b"..", "it was tried twice"


@app.evaluate()
def lasting(message: Message, context: Context) -> Message:
    """Writes its process and its parent's into a file, and does not end."""
    with open(str(message.content["config"]["path"]), "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    while True:
        time.sleep(1000)


OWNER = """
import sys
from flwr.app import ConfigRecord, RecordDict
from fedkd.simulate.flower.local_grid import LocalGrid

asked = RecordDict({"config": ConfigRecord({"path": sys.argv[1]})})
with LocalGrid("tests.simulate.test_workers:app", 2, {}, workers=2) as grid:
    list(grid.send_and_receive([grid.create_message(asked, "evaluate", node, "1") for node in (1, 2)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("first", ["fork server", "owner"])
def test_no_process_outlives_the_run_whatever_is_killed(tmp_path, first):
    """Also not a client in the middle of a local update that never ends."""
    mark = tmp_path / "processes"
    with subprocess.Popen([sys.executable, "-c", OWNER, str(mark)], cwd=ROOT, stderr=subprocess.DEVNULL) as owner:
        wait_for(lambda: mark.exists() and len(mark.read_text().splitlines()) == 2)
        running = {int(word) for word in mark.read_text().split()}
        (fork_server,) = {int(line.split()[1]) for line in mark.read_text().splitlines()}
        os.kill(fork_server if first == "fork server" else owner.pid, signal.SIGKILL)
        if first == "fork server":
            assert owner.wait(240) != 0
    wait_for(lambda: all(is_over(Path(f"/proc/{pid}/stat")) for pid in running))
