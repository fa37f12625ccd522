"""Trackers get the rows of a run, and change nothing in it."""

from __future__ import annotations

import json
import re
import time

import pytest

from fedkd.core import notes, specs
from fedkd.core.errors import PluginError, UsageError
from fedkd.simulate import checks, simulate, trackers
from tests.conftest import ROOT, is_interrupted_after, simulated, tiny

(LINES,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tracking.md").read_text(), re.DOTALL)
BAD = """
class Changes:
    def start(self, entry): pass
    def log(self, row): row["clients"].clear(), row.clear()
    def end(self, result): result.clear()

class Fails:
    def __init__(self, *, on: str = "log"):
        self.on, self.calls = on, []
    def start(self, entry): self.call("start")
    def log(self, row): self.call("log")
    def end(self, result): self.call("end")
    def call(self, name):
        self.calls.append(name)
        print("called", self.on, name)
        if name == self.on:
            raise SystemExit("no\\nnetwork") if name == "end" else ConnectionError("no\\nnetwork")

class Half:
    def start(self, entry): pass
"""
PAIR = {"algorithm": "fedavg", "compare": "fd", "rounds": 3}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "lines.py").write_text(LINES)
    (folder / "bad.py").write_text(BAD)
    return folder


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("untracked") / "run", **PAIR)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_a_tracker_gets_rows_and_results_and_no_number_depends_on_it(tmp_path, capsys, mine, untracked):
    own = [f"{mine}/bad.py:{name}" for name in ("Changes", "Fails:on=start", "Fails", "Fails:on=end")]
    out = tmp_path / "run"
    assert simulated(out, tracker=[*own, f"{mine}/lines.py:Lines"], **PAIR) == untracked
    said = capsys.readouterr()
    lines, rows = read(out / "tracked.jsonl"), read(out / "rounds.jsonl")
    runs = json.loads((out / "result.json").read_text())["runs"]
    for run, tracked in zip(runs, (lines[:5], lines[5:]), strict=True):
        start, *logged, end = tracked
        assert (start["start"], start["group"], start["rounds"]) == (f"{run['algorithm']}, seed 0", "run", 0)
        assert logged == [row for row in rows if row["algorithm"] == run["algorithm"]]
        assert end == {"end": run}
    assert lines[0]["identity"] != lines[5]["identity"]
    notices = [line for line in said.err.splitlines() if "--tracker" in line]
    assert [re.findall(r"failed (.*) and is left out", line) for line in notices] == [
        ["before round 1"],
        ["in round 1"],
        ["at the end of a run"],
    ]
    assert all(line.endswith("the run goes on (ConnectionError: network).") for line in notices[:2])
    calls = [line.split()[1:] for line in said.out.splitlines() if line.startswith("called")]
    assert [name for on, name in calls if on == "log"] == ["start", "log"]  # not once more, in no entry


def test_a_resumed_entry_continues_and_a_finished_one_is_not_started_again(tmp_path, mine, untracked):
    out = tmp_path / "run"
    options = {**PAIR, "out": str(out), "tracker": f"{mine}/lines.py:Lines"}
    assert is_interrupted_after(5, lambda: simulate(tiny(**options)))  # in round 2 of fd, which has no checkpoint
    simulate(tiny(**options, resume=str(out)))
    start, one, end, again, two, three, last = read(out / "tracked.jsonl")[5:]
    assert start["start"] == again["start"] == "fd, seed 0"
    assert start["identity"] == again["identity"]
    assert [start["rounds"], again["rounds"], one["round"], two["round"], three["round"]] == [0, 1, 1, 2, 3]
    assert (end["end"], last["end"]["rounds"]) == (None, 3)
    assert without_times(read(out / "rounds.jsonl")) == untracked


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_said_before_anything_is_computed(monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda library: None)
    with pytest.raises(UsageError, match=re.escape(f"pip install 'fedkd[{name}]'")):
        checks.check(tiny(tracker=name))


def test_what_is_no_tracker_is_refused(mine):
    with pytest.raises(PluginError, match="lacks one of the methods"):
        checks.check(tiny(tracker=f"{mine}/bad.py:Half"))
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        checks.check(tiny(tracker="tensorbord"))


def test_paths_and_options_of_the_machine_are_not_passed_on(tmp_path):
    run = tiny(data_dir="/home/me", ray_address="host:1", out=str(tmp_path / "run"), tracker="wandb", workers="2")
    entry = trackers.entry(run, tmp_path / "run", "x", 0)
    passed = entry.config | {"name": entry.name, "group": entry.group}
    assert not [value for value in passed.values() if "me" in str(value).split("/") or "host" in str(value).split(":")]
    assert not {"out", "data-dir", "resume", "ray-address", "workers", "tracker"} & entry.config.keys()
    assert {"algorithm", "seed", "rounds", "learning-rate"} <= entry.config.keys()


# The libraries themselves: two rounds, an interruption after the second, of which there is no checkpoint; then a third.

ROWS = [
    {
        "algorithm": "fedavg",
        "seed": 0,
        "round": number,
        "test_accuracy": 0.25 * number,
        "validation_accuracy": None,
        "uplink_serialized_bytes": 1000 * number,
        "failures": [{"client": 1, "cause": "error", "reason": "on host X"}],
        "train_metrics": {"coverage": 0.5 * number},
    }
    for number in (1, 2, 3)
]
RESULT = {"algorithm": "fedavg", "rounds": 3, "test_accuracy": 0.75, "failure_causes": {"no reply": 2}}


def track(name, out, pause=0.0):
    """Two rounds, an interruption, the second again with another number, and the third; as a run does it."""
    out.mkdir()
    for rounds, rows, result in ((0, ROWS[:2], None), (1, [{**ROWS[1], "test_accuracy": 0.5}, ROWS[2]], RESULT)):
        tracker = specs.call("tracker", name)
        tracker.start(trackers.entry(tiny(algorithm="fedavg", seed=0), out, f"identity{out.name}", rounds))
        for row in rows:
            tracker.log(row)
        tracker.end(result)
        time.sleep(pause)


def test_tensorboard_has_each_round_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path / "run")
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert folder.name.startswith("fedavg-seed0-")
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {"test_accuracy", "uplink_serialized_bytes", "train_metrics/coverage"}
    for name in events.Tags()["scalars"]:
        expected = [(row["round"], trackers.numbers(row)[name]) for row in ROWS]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    (text,) = events.Tensors("result/text_summary")
    assert '"test_accuracy": 0.75' in text.tensor_proto.string_val[0].decode()


def wandb_records(data):
    """The messages in a file of the client: LevelDB's log of blocks of 32 KiB, after a header of its own."""
    place, message = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield message
            message = b""


def test_wandb_offline_has_each_round(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb:project=mine", tmp_path / "run", pause=1.1)  # its folders are named by the second
    history, runs, summary = [], [], {}

    def values(items):
        return {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in items}

    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                history.append(values(record.history.item))
            summary |= values(record.summary.update)
    assert {(run.run_id, run.project, run.run_group, run.display_name) for run in runs} == {
        ("identityrun", "mine", "run", "fedavg, seed 0")
    }
    assert [(row["round"], row["test_accuracy"]) for row in history] == [(1, 0.25), (2, 0.5), (2, 0.5), (3, 0.75)]
    assert {row["_step"] for row in history} == {1, 2, 3}
    assert history[-1]["train_metrics/coverage"] == 1.5
    assert "failures" not in history[-1]
    assert summary["result/test_accuracy"] == 0.75


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_has_each_round_once(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{store}:///{tmp_path}/{'mlflow.db' if store == 'sqlite' else 'mlruns'}")
    track("mlflow:experiment=mine", tmp_path / "run")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("fedavg, seed 0", "FINISHED")
    assert run.data.params["algorithm"] == "fedavg"
    assert run.data.tags["fedkd.group"] == "run"
    for name in ("test_accuracy", "uplink_serialized_bytes", "train_metrics/coverage"):
        expected = [(row["round"], trackers.numbers(row)[name]) for row in ROWS]
        assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)] == expected
    assert run.data.metrics["result/test_accuracy"] == 0.75
    assert run.data.metrics["result/failure_causes/no reply"] == 2


@pytest.fixture(autouse=True)
def _notes():
    notes.say.cache_clear()  # a notice is printed once in a process
