"""``--dry-run``: its bytes are those of a run, and nothing is written."""

from __future__ import annotations

import json

import pytest

from fedkd.core.errors import UsageError
from fedkd.simulate import dry_run, estimate, measuring, simulate
from fedkd.simulate.experiment import prepare
from fedkd.simulate.measuring import Measured, Measurement
from tests.conftest import run, tiny

METHODS = ["dsfl", "fedavg", "local", "selective-fd:client_threshold=0,server_threshold=2"]
OPTIONS = {
    "clients": 4,
    "participation": 0.5,
    "rounds": 2,
    "seeds": 2,
    "partitioner": "dirichlet:alpha=0.5",
}


@pytest.fixture(autouse=True)
def _few_batches(monkeypatch):
    """Bytes do not depend on how many batches are measured."""
    for module in (measuring, dry_run):
        monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(measuring, "EPOCHS", {1: 1, 2: 2})


def estimated(**options):
    """What the dry run says of each method, and of the run."""
    about = json.loads(estimate(tiny(json=True, **options)))
    return {each["algorithm"]: each for each in about["methods"]}, about


def bytes_of(path):
    """The serialized bytes of each method, all seeds together."""
    found: dict[str, int] = {}
    for each in json.loads((path / "result.json").read_text())["runs"]:
        sent = each["uplink_serialized_bytes"] + each["downlink_serialized_bytes"]
        found[each["algorithm"]] = found.get(each["algorithm"], 0) + sent
    return found


def test_the_bytes_are_those_of_a_run(tmp_path):
    options = {**OPTIONS, "algorithm": METHODS[0], "compare": METHODS[1:]}
    methods, about = estimated(**options)
    simulate(tiny(out=str(tmp_path / "run"), **options))
    sent = bytes_of(tmp_path / "run")
    exact = {name: each["total_bytes"] for name, each in methods.items() if each["precision"] == "exact"}
    assert exact == {name: sent[name] for name in METHODS[:-1]}
    assert (methods[METHODS[-1]]["precision"], methods["local"]["total_bytes"]) == ("about", 0)
    assert methods[METHODS[-1]]["uplink_bytes"] >= 2 * 40 * 10  # every sample may be selected
    assert about["memory_bytes"] > 50e6


def test_with_two_models_and_a_coder_it_is_an_upper_bound(tmp_path):
    options = {
        **OPTIONS,
        "algorithm": "ensemble",
        "compare": "dense:epochs=3,generator_steps=1,generator_width=4",
        "model": "cnn:width=4,cnn:width=8",
        "uplink_codec": "bits:bits=2,coder=range,delta=true",
        "seeds": 1,
    }
    methods, _ = estimated(**options)
    simulate(tiny(out=str(tmp_path / "run"), **options))
    sent, dense = bytes_of(tmp_path / "run"), str(options["compare"])
    assert (methods["ensemble"]["precision"], methods[dense]["precision"]) == ("at most", "exact")
    assert 0.6 * methods["ensemble"]["total_bytes"] < sent["ensemble"] <= methods["ensemble"]["total_bytes"]
    assert methods[dense]["total_bytes"] == sent[dense]


def test_it_prints_a_table_and_writes_nothing(tmp_path):
    done = run(
        "--dataset=digits",
        "--proxy=holdout:size=40",
        "--clients=2",
        "--model=cnn:width=4",
        f"--out={tmp_path}/run",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "ensemble" in done.stdout
    assert "times are of all rounds" in done.stdout
    assert not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1


def test_a_resume_has_no_dry_run(tmp_path):
    with pytest.raises(UsageError, match="leave out --resume"):
        estimate(tiny(resume=str(tmp_path)))


def test_times_grow_with_batches_clients_and_rounds():
    """A client's batch takes 0.1 s, a batch of distillation 0.01 s; two clients train at once."""
    config = tiny(clients=4, local_epochs=3, batch_size=32, distill_epochs=2, rounds=10, evaluate_every=4)
    experiment = prepare(config)

    def measured(steps: int) -> Measurement:
        seconds = (1 + 0.1 * steps, 2 + 0.1 * steps)
        clients = Measured(steps, 2, 320, 5.0, seconds, (0.5, 0.25), (0.0, 0.0), (0.0, 0.0))
        return Measurement({"cnn:width=8": clients}, steps, 3 + 0.01 * steps)

    few, more = measured(2), measured(20)
    batches = 3 * experiment.training_partition.sizes / 32
    shares = sorted(batches, reverse=True)
    slowest = 0.1 * max(shares[0] + shares[3], shares[1] + shares[2])
    server = 3 + 0.01 * 2  # 40 proxy samples are one batch
    first, later = dry_run._training(experiment, config, few, more)
    assert first == pytest.approx(5 + 2 * 1 + slowest + server, abs=0.02)
    assert later == pytest.approx(2 * 2 + slowest + server, abs=0.02)
    # Clients in the rounds 4, 8 and 10, four of them two by two; the student in each.
    assert dry_run._evaluations(experiment, config, more.clients) == pytest.approx(3 * 2 * 0.5 + 10 * 0.25)
