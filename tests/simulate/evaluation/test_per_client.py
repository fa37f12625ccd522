"""``--local-test``, the results of each client, and how they are spread over the clients."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss

from fedkd.algorithms.base import Update
from fedkd.core import run_directory
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Reply
from fedkd.core.errors import UsageError
from fedkd.core.report import table
from fedkd.core.tensors import take
from fedkd.data.partition import Partition, hold_out
from fedkd.simulate import header, simulate
from fedkd.simulate.evaluation import metrics, per_client, stopping
from fedkd.simulate.experiment import prepare, prepared
from fedkd.simulate.flower import client_app, server_app
from fedkd.simulate.flower.local_grid import LocalGrid
from fedkd.simulate.rounds import Round
from tests.conftest import simulated, tiny
from tests.simulate.test_resume import result_of, resume

NONE = {"failures": [], "serialized": SerializedBytes(), "downlink": Traffic(), "uplink": Traffic()}
SMALL = {"model": "cnn:width=4", "local_test": 0.3, "partitioner": "linear", "batch_size": 32}

# The local test split.


def test_the_local_test_split_is_held_out_of_each_client():
    whole, parted = prepare(tiny(partitioner="linear")), prepare(tiny(partitioner="linear", local_test=0.3))
    for client, rows in enumerate(whole.partition):
        training, test = parted.partition[client], parted.local_tests[client]
        assert len(test) == round(0.3 * len(rows))
        assert sorted([*training, *test]) == sorted(rows)
        assert list(test) == sorted(test)
        assert list(training) == sorted(training)
        assert torch.equal(parted.client(client, 1, {}).data.pixels, whole.train.pixels[torch.from_numpy(training)])
    assert parted.sizes == parted.partition.sizes.tolist()
    assert np.array_equal(parted.proxy_rows, whole.proxy_rows)


def test_it_follows_from_seed_and_client():
    parts = Partition.of([np.arange(40), np.arange(40, 80), np.arange(80, 90)])
    _, first = hold_out(parts, 0.5, seed=1)
    _, again = hold_out(Partition.of([parts[0]]), 0.5, seed=1)
    _, other = hold_out(parts, 0.5, seed=2)
    assert np.array_equal(first[0], again[0]), "other clients change nothing"
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], first[1] - 40)
    assert first[0].tolist() != list(range(20)), "it is drawn"


@pytest.mark.parametrize(("size", "held"), [(1, 0), (2, 1), (3, 2), (10, 9)])
def test_a_client_trains_on_at_least_one_sample(size, held):
    training, test = hold_out(Partition.of([np.arange(size)]), 0.9, seed=0)
    assert (len(training[0]), len(test[0])) == (size - held, held)


def test_pooled_data_has_no_sample_of_a_local_test_split():
    experiment = prepare(tiny(algorithm="central", local_test=0.3))
    training = set(experiment.pooled(1).tolist())
    assert training == set(experiment.partition.rows.tolist())
    assert not training & set(experiment.local_tests.rows.tolist())
    assert len(experiment.local_test_rows(0)) == len(experiment.local_tests.rows) > 300


# The numbers of a round.


@pytest.mark.parametrize("algorithm", ["fedavg", "local"])
def test_every_result_of_a_client_is_that_of_scikit_learn(tmp_path, algorithm):
    (row,) = simulated(tmp_path / "run", algorithm=algorithm, rounds=1, client_test_samples=100, **SMALL)
    experiment = prepare(tiny(algorithm=algorithm, rounds=1, client_test_samples=100, **SMALL))
    setup, state = experiment.setup, experiment.algorithm.initial_state(experiment.setup)
    sample = experiment.client_test.select(experiment.test_sample)
    student = experiment.algorithm.global_model(setup, {})
    if algorithm == "fedavg":
        from fedkd.core import tensors

        student = tensors.load(tmp_path / "run" / "student.safetensors")

    def scores(weights, images):
        logits = setup.trainer.predict("cnn:width=4", weights, images.pixels).double()
        labels, probs = images.labels.numpy(), logits.softmax(-1).numpy()
        return accuracy_score(labels, probs.argmax(1)), log_loss(labels, probs, labels=range(10))

    for client, entry in enumerate(row["clients"]):
        message = experiment.algorithm.broadcast(setup, state, client)
        _, memory = experiment.algorithm.local_update(setup, experiment.client(client, 1, {}), message)
        local = experiment.samples(experiment.local_tests[client])
        accuracy, loss = scores(take("model", memory), sample)
        local_accuracy, local_loss = scores(take("model", memory), local)
        assert entry == {
            "client": client,
            "samples": len(experiment.partition[client]),
            "accuracy": pytest.approx(accuracy),
            "loss": pytest.approx(loss, rel=1e-5),
            "local_samples": len(local),
            "local_accuracy": pytest.approx(local_accuracy),
            "local_loss": pytest.approx(local_loss, rel=1e-5),
            "student_local_accuracy": pytest.approx(scores(student, local)[0]) if student else None,
        }
    for key, name in (("client_accuracy", "accuracy"), ("local_accuracy", "local_accuracy")):
        values = [entry[name] for entry in row["clients"]]
        assert len(set(values)) > 1
        assert row[key] == pytest.approx(np.mean(values))
        assert row[f"{key}_worst"] == min(values)
        assert row[f"{key}_p10"] == pytest.approx(np.quantile(values, 0.1))
        assert row[f"{key}_std"] == pytest.approx(np.std(values))
    (summary,) = json.loads((tmp_path / "run" / "result.json").read_text())["runs"]
    assert {key: summary[key] for key in per_client.KEYS} == {key: row[key] for key in per_client.KEYS}
    local = row["student_local_accuracy"]
    assert local == (pytest.approx(np.mean([e["student_local_accuracy"] for e in row["clients"]])) if student else None)


def evaluated(*sent: tuple[torch.Tensor, dict]) -> metrics.ClientEvaluation:
    """The evaluation in which clients send these logits and metrics."""
    experiment = prepare(tiny(algorithm="local", local_test=0.3))

    def exchange(kind, number, requests, expected):
        return [Reply(c, Update({"logits": x}, 1, m), "", SerializedBytes()) for c, (x, m) in enumerate(sent)]

    updates = {client: Update({}, 10 + client) for client in range(len(sent))}
    return metrics.evaluate_clients(experiment, exchange, Round(1, {}, updates=updates, **NONE))


OF_LOCAL = {"local_samples": 9.0, "local_accuracy": 0.5, "local_loss": 2.0}


def test_a_model_that_diverged_has_no_loss_and_a_client_without_a_local_test_split_does_not_count():
    fine, diverged = torch.eye(10)[torch.zeros(359, dtype=torch.long)], torch.full((359, 10), torch.nan)
    found = evaluated((fine, {}), (diverged, OF_LOCAL | {"local_loss": math.inf, "local_accuracy": 0.0}))
    first, second = found.clients
    assert (first["samples"], first["local_samples"], first["local_accuracy"], first["local_loss"]) == (
        10,
        0,
        None,
        None,
    )
    assert (second["accuracy"], second["loss"], second["local_accuracy"], second["local_loss"]) == (
        0.0,
        None,
        0.0,
        None,
    )
    assert per_client.summary(found.clients)["local_accuracy"] == 0.0
    json.dumps(found.clients, allow_nan=False)
    assert per_client.summary([]) == dict.fromkeys(per_client.KEYS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_accuracy": 1.1},
        {"local_accuracy": math.nan},
        {"local_accuracy": -0.1},
        {"local_samples": 0.0},
        {"local_samples": math.inf},
        None,
    ],
)
def test_impossible_results_of_a_local_test_split_are_refused(wrong):
    fine = torch.eye(10)[torch.zeros(359, dtype=torch.long)]
    sent = {"local_samples": 9.0} if wrong is None else OF_LOCAL | wrong
    found = evaluated((fine, OF_LOCAL), (fine, sent))
    assert [entry["client"] for entry in found.clients] == [0]
    assert [(each.client, each.cause) for each in found.failures] == [(1, "refused")]
    assert "impossible results of its local test split" in found.failures[0].reason


# Runs.


def test_a_run_with_local_tests_is_resumed_and_shows_them(tmp_path, capsys):
    options = {**SMALL, "algorithm": "fedavg", "compare": "central fedmd"}
    simulate(tiny(**options, rounds=2, out=str(tmp_path / "whole")))
    shown = capsys.readouterr().out
    assert "local test, " in shown
    assert "student local" in shown
    simulate(tiny(**options, rounds=1, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=2)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")
    with np.load(tmp_path / "whole" / "partition.npz") as arrays:
        experiment = prepare(tiny(**options))
        assert np.array_equal(arrays["seed0_local_test_rows"], experiment.local_tests.rows)
        assert np.array_equal(arrays["seed0_local_test_ends"], experiment.local_tests.ends)
        assert np.array_equal(arrays["seed0_rows"], experiment.partition.rows)
    central = json.loads((tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()[2])
    assert central["algorithm"] == "central"
    (entry,) = central["clients"]
    assert entry["local_samples"] == len(experiment.local_tests.rows)


def test_the_table_has_no_column_for_it_without_the_option(tmp_path):
    rows = simulated(tmp_path / "run", rounds=1, algorithm="local", model="cnn:width=4")
    runs = json.loads((tmp_path / "run" / "result.json").read_text())["runs"]
    assert not any("local" in title for title in table.side_by_side(runs, {("local", 0): rows}).titles)
    assert rows[0]["local_accuracy"] is rows[0]["clients"][0]["local_accuracy"] is None


def test_a_condition_on_it_needs_the_option():
    with pytest.raises(UsageError, match=r"--stop-when local_accuracy>=0\.5 needs --local-test"):
        stopping.check(tiny(stop_when="local_accuracy>=0.5"))
    stopping.check(tiny(stop_when="local_accuracy_worst>=0.5 client_accuracy_p10>=0.2", local_test=0.1))


def test_a_node_holds_out_a_part_of_its_own_images(tmp_path):
    config = tiny(
        partitioner="own", clients=2, rounds=1, local_test=0.2, model="cnn:width=4", out=str(tmp_path / "run")
    )
    public = prepared(tiny(clients=2))
    for client in range(2):
        for row in public.training_partition[client][:30]:
            folder = tmp_path / f"node{client}" / str(int(public.train.labels[row]))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(public.train.pixels[row].numpy()).save(folder / f"{row}.png")

    def placed(message, context):
        context.node_config["data"] = str(tmp_path / f"node{context.node_config['partition-id']}")
        return client_app.app(message, context)

    app = ClientApp()
    for kind in (app.train, app.evaluate, app.query):
        kind()(placed)
    server_app.run_on(LocalGrid(app, 2, config.run_config()), run_directory.begin(config, "x"))
    row = json.loads((tmp_path / "run" / "rounds.jsonl").read_text())
    assert row["failures"] == row["evaluation_failures"] == []
    assert [(entry["samples"], entry["local_samples"]) for entry in row["clients"]] == [(24, 6), (24, 6)]
    assert row["local_accuracy"] is not None
    assert row["student_local_accuracy"] is None, "the server has none of the images"


def test_clients_without_local_test_samples_are_named():
    experiment = prepare(tiny(partitioner="size:sizes=1+600+1", local_test=0.2))
    assert header.too_small(experiment) == ["with seed 0, clients 0, 2 have no local test samples"]
    assert header.too_small(prepare(tiny(partitioner="size:sizes=1+600+1"))) == []
