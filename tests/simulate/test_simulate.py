"""The main job as people run it: as a process, with its files, its numbers and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.core import tensors
from fedkd.core.config import Config
from fedkd.core.errors import PluginError, RunError, UsageError
from fedkd.data import readers
from fedkd.data.partition import Partition
from fedkd.simulate import simulate
from fedkd.simulate.experiment import prepare
from tests.conftest import FLAGS, OTHERWISE_IN_TRAINING, ROOT, TINY, run, simulated, tiny, wait_for

OWN = '''
from dataclasses import dataclass
from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.tensors import put

@dataclass(frozen=True)
class Name(Algorithm):
    """Every client sends the mean of its logits; the server sends nothing."""
    scale: float = 1.0
    fail: str = ""
    metrics = ("scale",)

    def upload_spec(self, setup, client, number):
        return {"mean": (setup.classes,)}

    def local_update(self, setup, client, request):
        if self.fail == "local" or (self.fail == "one" and client.id == 1):
            raise ZeroDivisionError("a client of mine")
        weights = setup.trainer.train(client, setup.local_weights(client))
        mean = setup.trainer.predict(client.model, weights, setup.proxy.images).mean(0) * self.scale
        return Update({"mean": mean}, len(client.data), {"scale": self.scale}), put("model", weights)

    def aggregate(self, setup, state, updates, seed):
        if self.fail == "aggregate":
            raise ZeroDivisionError("a server of mine")
        if self.fail == "exit":
            raise SystemExit(3)
        return state

class NoAlgorithm:
    pass
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run(*FLAGS, "--compare", "fedavg", "fedmd", "--seeds", 2, "--json", "--out", out)


def test_json_is_one_object_on_standard_output(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["status"] == "ok"
    assert result["out"] == str(out)
    assert [(r["algorithm"], r["seed"]) for r in result["runs"]] == [
        (a, s) for s in (0, 1) for a in ("ensemble", "fedavg", "fedmd")
    ]
    for entry in result["runs"]:
        assert {
            "rounds",
            "clients",
            "test_accuracy",
            "test_accuracy_last5",
            "teacher_accuracy",
            "client_accuracy",
        } <= set(entry)
        assert {"uplink_serialized_bytes", "downlink_serialized_bytes", "training_seconds", "partition_sha256"} <= set(
            entry
        )
        assert entry["rounds"] == 2
        assert entry["evaluated_model"] == ("clients" if entry["algorithm"] == "fedmd" else "student")
    hashes = [r["partition_sha256"] for r in result["runs"]]
    assert len(set(hashes[:3])) == 1, "methods of a comparison share the partition"
    assert hashes[0] != hashes[3], "and seeds do not"


def test_the_screen_shows_header_rows_table_and_path(finished):
    out, process = finished
    shown = process.stderr
    for words in (
        "proxy",
        "partition",
        "communication",
        "66",
        "ensemble, seed 0",
        "2/2",
        "bytes",
        "to ",
        f"run directory: {out}",
    ):
        assert words in shown
    assert "Traceback" not in shown
    assert "\x1b" not in shown, "no control codes where there is no terminal"


def test_the_run_directory(finished):
    out, process = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.toml", "env.json", "partition.npz", "rounds.jsonl", "result.json", "curve.png", "curve.svg",
        "curve.pdf", "report.html",
        "student.safetensors", "student-fedavg-seed0.safetensors", "student-ensemble-seed1.safetensors",
        "student-fedavg-seed1.safetensors", "checkpoint", "confusion.csv", "confusion-fedavg-seed0.csv",
        "confusion-ensemble-seed1.csv", "confusion-fedavg-seed1.csv",
    }  # fmt: skip
    assert json.loads((out / "result.json").read_text()) == json.loads(process.stdout)
    config = Config.parse(tomllib.loads((out / "config.toml").read_text()))
    assert config == tiny(compare="fedavg fedmd", seeds=2, json=True, out=str(out))
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2 * 3 * 2
    assert json.loads((out / "env.json").read_text())["packages"]["flwr"].startswith("1.4")
    with np.load(out / "partition.npz") as held:
        parts = np.split(held["seed0_rows"], held["seed0_ends"][:-1])
        assert Partition.of(parts).digest() == json.loads(process.stdout)["runs"][0]["partition_sha256"]
        assert not set(held["seed0_proxy"]) & set(held["seed0_rows"])
        assert held["seed0_counts"].sum() == len(held["seed0_rows"])


def test_the_saved_student_is_the_one_that_was_measured(finished):
    from fedkd.simulate.experiment import prepare
    from fedkd.training import loop

    out, process = finished
    experiment = prepare(tiny())
    logits = experiment.setup.trainer.predict(
        "cnn:width=8", tensors.load(out / "student.safetensors"), experiment.test.pixels
    )
    accuracy, loss = loop.score(logits, experiment.test.labels)
    entry = json.loads(process.stdout)["runs"][0]
    assert accuracy == pytest.approx(entry["test_accuracy"], abs=1e-9)
    assert loss == pytest.approx(entry["test_loss"], rel=1e-5)


def test_bytes_of_the_result_are_those_of_its_rounds(finished):
    out, process = finished
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    for entry in json.loads(process.stdout)["runs"]:
        mine = [r for r in rows if (r["algorithm"], r["seed"]) == (entry["algorithm"], entry["seed"])]
        assert entry["uplink_serialized_bytes"] == sum(r["uplink_serialized_bytes"] for r in mine)
        assert entry["test_accuracy"] == mine[-1]["test_accuracy"]
    logits_up = 2 * 3 * (40 * 10 * 4 + 128 + len("logits"))
    assert json.loads(process.stdout)["runs"][0]["uplink_serialized_bytes"] == logits_up


def test_two_runs_with_one_seed_give_the_same_rounds(tmp_path, images_of_figures):
    first, again, other = (simulated(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first == again
    assert first != other
    students = [tensors.load(tmp_path / name / "student.safetensors") for name in ("a", "b")]
    assert tensors.equal(*students)
    assert (tmp_path / "a" / "curve.svg").read_bytes() == (tmp_path / "b" / "curve.svg").read_bytes()


def test_a_comparison_does_not_change_the_run_it_is_compared_with(tmp_path):
    alone = simulated(tmp_path / "alone")
    assert simulated(tmp_path / "beside", compare="local fedavg")[: len(alone)] == alone


def test_the_proxys_labels_are_never_read(tmp_path, monkeypatch):
    """Other labels on the held-out rows, and on another data set used as proxy, change nothing."""
    from fedkd.data import loading
    from fedkd.simulate import experiment

    def caches_cleared():
        loading.read.cache_clear()
        experiment.prepared.cache_clear()

    for proxy in ("holdout:size=40", "noise:size=50"):
        caches_cleared()
        name = proxy.partition(":")[0]
        plain = simulated(tmp_path / f"{name}-plain", proxy=proxy)
        rows = np.load(tmp_path / f"{name}-plain" / "partition.npz").get("seed0_proxy")
        real = readers.read

        def shuffled(source, split, data_dir="", rows=rows, real=real):
            images = real(source, split, data_dir)
            if source.name == "noise":
                images.labels.copy_(images.labels.flip(0))
            elif split == "train" and rows is not None:
                images.labels[rows] = (images.labels[rows] + 1) % 10
            return images

        monkeypatch.setattr(readers, "read", shuffled)
        caches_cleared()
        assert simulated(tmp_path / f"{name}-shuffled", proxy=proxy) == plain
        monkeypatch.undo()
    caches_cleared()


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def test_a_user_defined_algorithm(own, tmp_path):
    rows = simulated(tmp_path / "run", algorithm=f"{own}:Name:scale=2")
    assert rows[-1]["uplink_serialized_bytes"] == 3 * (10 * 4 + 128 + len("mean"))
    assert rows[-1]["train_metrics"] == {"scale": 2.0}
    assert rows[-1]["test_accuracy"] == rows[-1]["client_accuracy"]


def test_a_client_that_fails_is_shown_and_survived(own, tmp_path, capsys):
    rows = simulated(tmp_path / "run", algorithm=f"{own}:Name:fail=one")
    assert rows[0]["failures"] == [{"client": 1, "cause": "error", "reason": "ZeroDivisionError: a client of mine"}]
    assert rows[0]["participants"] == 2
    shown = capsys.readouterr().out
    assert shown.count("updates missing: 1 error (client 1)") == 2
    assert shown.count("client 1: ZeroDivisionError: a client of mine") == 1, "each kind is shown once"
    assert "Traceback" in (tmp_path / "run" / "errors.jsonl").read_text()


def test_precedence_flags_over_environment_over_file(tmp_path):
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in (TINY | {"rounds": 1, "clients": 2, "seed": 7}).items())
    )
    process = run(scenario, "--seed", 9, "--out", tmp_path / "run", FEDKD_SEED="8", FEDKD_CLIENTS="4")
    assert process.returncode == 0, process.stderr
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (config["seed"], config["clients"], config["rounds"]) == (9, 4, 1)


def test_with_json_the_output_of_user_code_goes_to_standard_error(tmp_path, capsys):
    from fedkd.core import cli

    (tmp_path / "mine.py").write_text(
        "print('imported')\nfrom fedkd.algorithms.local import Local\n"
        "class Mine(Local):\n"
        "    def local_update(self, *given):\n        print('trains')\n        return super().local_update(*given)\n"
    )
    given = [part for key, value in TINY.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as ended:
        cli.run(
            cli.command(simulate, Config),
            [*given, "--algorithm", f"{tmp_path}/mine.py:Mine", "--json", "--out", f"{tmp_path}/out"],
        )
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(shown.out)["status"] == "ok"
    assert "imported" in shown.err
    assert "trains" in shown.err


def test_a_participation_below_one(tmp_path):
    rows = simulated(
        tmp_path / "run",
        clients=6,
        participation=0.5,
        algorithm="ensemble:downlink=labels",
        compare="dsfl fedmd fedavg",
    )
    assert {row["participants"] for row in rows} == {3}


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"uplink_codec": "top:k=10"}, UsageError, "with 10 classes, k is at most 9"),
        (
            {"downlink_codec": "{own}:notcodec"},
            PluginError,
            "is not a subclass of fedkd.core.communication.codecs.Codec",
        ),
        ({"aggregator": "{own}:narrow"}, PluginError, "--aggregator .*:narrow returned \\[40, 3\\]"),
        ({"loss": "{own}:vector"}, PluginError, r"--loss .*:vector returns \[8, 10\], not one number"),
        ({"loss": "{own}:detached"}, PluginError, "--loss .*:detached has no gradient with respect to the student's"),
        ({"loss": "{own}:infinite"}, PluginError, "--loss .*:infinite is inf for random logits"),
        ({"model": "{own}:number"}, PluginError, "number' is int, not a torch.nn.Module"),
        ({"distill_learning_rate": 1e12}, RunError, "Round 1: the student of ensemble has diverged; lower"),
        ({"algorithm": "local", "learning_rate": 1e30}, RunError, "Round 1: the models of local have all diverged"),
        ({"algorithm": "central", "partitioner": "own"}, UsageError, "needs all data in one place"),
        ({"algorithm": "{own}:Deploying"}, PluginError, "Deploying failed on the server: KeyError: 'oops'"),
        ({"dataset": "{own}:listed"}, PluginError, "is list; a function or class that gives pairs"),
        ({"proxy": "{own}:listed"}, PluginError, "is list; a function or class that gives pairs"),
        ({"algorithm": "{own}:Deploying:house=3"}, PluginError, "annotate the option otherwise"),
        ({"model": "cnn:width=8,resnet8:width=8", "compare": "fedproto"}, UsageError, "embeddings of one width"),
        ({"model": "{own}:Pair"}, PluginError, "Pair returns a tuple for 2 images in training, not"),
        ({"student": "{own}:Wide"}, PluginError, r"Wide returns \(2, 11\) for 2 images in training, not \(2, 10\)"),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path, changes, error, expected):
    (tmp_path / "own.py").write_text(
        "def notcodec():\n    return 3\n"
        "def narrow(logits, weights):\n    return logits[0, :, :3].softmax(-1)\n"
        "def vector(student_logits, teacher_probs):\n    return student_logits - teacher_probs\n"
        "def detached(student_logits, teacher_probs):\n    return student_logits.detach().mean()\n"
        "def infinite(student_logits, teacher_probs):\n    return student_logits.mean() / 0\n"
        "def number(*, classes):\n    return 3\n"
        "def listed():\n    return [1]\n"
        "from fedkd.algorithms.fedavg import FedAvg\n"
        "class House: pass\n"
        "class Deploying(FedAvg):\n"
        "    def __init__(self, house: House = None): pass\n"
        "    def global_model(self, setup, state): raise KeyError('oops')\n" + OTHERWISE_IN_TRAINING
    )
    named = {k: v.replace("{own}", f"{tmp_path}/own.py") if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(error, match=expected):
        simulated(tmp_path / "run", **named)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_checking_a_model_with_dropout_changes_no_random_number():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prepare(tiny(model="torchvision:squeezenet1_1"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_proxy_of_one_image_is_enough(tmp_path):
    assert simulated(tmp_path, proxy="holdout:size=1", rounds=1)[0]["failures"] == []


def test_a_mistake_is_reported_before_torch_is_imported(tmp_path):
    script = (
        "import sys\nfrom fedkd.core import cli\nfrom fedkd.simulate.__main__ import app\n"
        "try: cli.run(app, sys.argv[1:])\n"
        "except SystemExit as end: print('torch' in sys.modules, 'flwr' in sys.modules, end.code)"
    )
    for flags, code in (
        (["--help"], 0),
        (["--algorithm", "dsfl:temp=1"], 2),
        (["--partitioner", "dirichlet:alpha=0"], 2),
        (["--model", "x"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *flags], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.stdout.splitlines()[-1] == f"False False {code}", done.stderr


def test_with_json_a_mistake_is_an_object_too():
    process = run("--clients", 0, "--json")
    assert process.returncode == 2
    assert json.loads(process.stdout)["code"] == 2
    assert "Traceback" not in process.stderr


def test_a_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    process = run(*FLAGS, "--out", tmp_path)
    assert process.returncode == 2
    assert "is in use" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupt_keeps_the_rounds_and_ends_with_130(tmp_path):
    import signal

    out = tmp_path / "run"
    flags = ["10000" if before == "--rounds" else flag for before, flag in zip(["", *FLAGS], FLAGS, strict=False)]
    command = [sys.executable, "-m", "fedkd.simulate", *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: (out / "rounds.jsonl").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    assert (out / "rounds.jsonl").read_text().endswith("\n")


def test_an_interrupt_before_the_first_round_leaves_the_name_free(tmp_path, monkeypatch):
    from fedkd.simulate import runner

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "choose_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
