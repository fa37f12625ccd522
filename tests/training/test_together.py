"""Requests of clients are executed in stacks, alone if that fails; runs on a CPU, where `pays` is replaced."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fedkd.core import notes
from fedkd.core.errors import StorageError, Terminated
from fedkd.core.tensors import equal
from fedkd.simulate import simulate
from fedkd.simulate.experiment import prepare
from fedkd.simulate.flower.local_update import ClientRunner
from fedkd.training import graphs, optimizers, together
from fedkd.training import requests as kinds
from fedkd.training.requests import Fit, Prediction, TaughtFit
from tests.conftest import simulated, slow, tiny

NETWORKS = """
import torch
from torch import nn

class Centered(nn.Module):
    "A sample depends on the others of its batch."
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, classes)

    def forward(self, x):
        return self.layer((x - x.mean(0)).flatten(1))
"""
#: A method whose client 1 fails in its objective, in the second of its batches.
FAILING = """
from dataclasses import dataclass
from torch.nn.functional import cross_entropy
from fedkd.algorithms.fedavg import FedAvg
from fedkd.algorithms.base import Update
from fedkd.core.tensors import put

@dataclass(frozen=True)
class Failing(FedAvg):
    def local_update(self, setup, client, message):
        calls = []
        def objective(logits, labels):
            calls.append(0)
            if client.id == 1 and len(calls) > 1:
                raise SystemExit("one has enough")
            return cross_entropy(logits, labels)
        weights = setup.trainer.train(client, message, objective=objective)
        return Update(weights, len(client.data)), put("model", weights)
"""
BYTES = ("uplink", "downlink", "failures", "participants", "round")


@pytest.fixture
def stacks(monkeypatch):
    """Clients compute together on a CPU too; the number of clients in each stack, and requests that ran alone."""
    sizes, alone = [], together._alone
    for kind in (Fit, TaughtFit, Prediction):
        stacked = kind.stacked

        def counted(requests, stacked=stacked):
            results = stacked(requests)
            sizes.append(len(requests))
            return results

        monkeypatch.setattr(kind, "stacked", staticmethod(counted))
    monkeypatch.setattr(together, "_alone", lambda request: (sizes.append(1), alone(request))[1])
    monkeypatch.setattr(together, "pays", lambda _: True)
    monkeypatch.setattr(together, "_limits", {})
    monkeypatch.setattr("fedkd.simulate.experiment.FEWEST_STEPS", 0)
    graphs.forget()
    notes.say.cache_clear()
    return sizes


def by_bytes(rows):
    return [{name: value for name, value in row.items() if name.startswith(BYTES)} for row in rows]


CHANGES = {
    "validation": 1300,
    "clients": 5,
    "learning_rate": 1e-3,
    "uplink_codec": "bits:bits=2,coder=range,delta=true",
}


@pytest.mark.parametrize("method", ["ensemble:downlink=labels", "scaffold"])
def test_a_run_sends_the_same_bytes_and_repeats_its_bits(method, stacks, tmp_path, monkeypatch):
    """With simulated faults, several models, and five clients in parts of at most three."""
    changes = CHANGES | {"algorithm": method, "faults": "corrupt=0.2,dropout=0.1", "min_clients": 1}
    if method == "scaffold":
        del changes["uplink_codec"]
    else:
        changes |= {"model": "cnn:width=4,cnn:width=8", "student": "cnn:width=4"}
    monkeypatch.setattr(together, "MOST", 3)
    first, again = (simulated(tmp_path / name, **changes) for name in ("first", "again"))
    assert first == again
    assert max(stacks) in (2, 3)
    monkeypatch.setattr(together, "pays", lambda _: False)
    del stacks[:]
    plain = simulated(tmp_path / "plain", **changes)
    assert not stacks
    for one, other in zip(first, plain, strict=True):
        assert one["test_loss"] == pytest.approx(other["test_loss"], abs=1e-3)
    assert by_bytes(first) == by_bytes(plain)


def test_a_client_that_fails_does_not_affect_the_others(stacks, tmp_path, capsys):
    (tmp_path / "failing.py").write_text(FAILING)
    algorithm = f"{tmp_path}/failing.py:Failing"
    changes = {"validation": 1300, "algorithm": algorithm, "min_clients": 1, "rounds": 1, "batch_size": 32}
    (row,) = simulated(tmp_path / "run", **changes)
    (failure,) = row["failures"]
    assert failure["client"] == 1
    assert "one has enough" in failure["reason"]
    # Training in a stack fails. Then the evaluation of those that have a model, and of the student.
    assert stacks == [1, 1, 1, 2, 1, 1]
    assert "one after the other" not in capsys.readouterr().err


def test_a_network_that_cannot_be_stacked_is_computed_client_by_client_and_named_once(stacks, tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETWORKS)
    changes = {"validation": 1300, "model": f"{tmp_path}/nets.py:Centered", "algorithm": "ensemble"}
    together_rows = simulated(tmp_path / "together", **changes)
    assert set(stacks) == {1}
    assert capsys.readouterr().err.count("computed one after the other: stacked, its outputs differ") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "pays", lambda _: False)
        assert simulated(tmp_path / "plain", **changes) == together_rows


def requests(count: int) -> list[Prediction]:
    """Predictions of a network with other weights for each client."""
    experiment = prepare(tiny())
    trainer, model = experiment.setup.trainer, experiment.setup.student
    start, network = trainer.initial_weights(model), trainer._network(model)
    weights = [{name: tensor + 0.1 * k for name, tensor in start.items()} for k in range(count)]
    return [Prediction(network, trainer.scaling, each, experiment.test.pixels[:9]) for each in weights]


def test_weights_of_another_network_are_refused_as_on_their_own(stacks):
    made = requests(3)
    made[1] = dataclasses.replace(made[1], weights={**made[1].weights, "more": torch.zeros(1)})
    first, second, third = together.execute(made)
    assert isinstance(second, RuntimeError)
    assert "more" in str(second)
    assert first.shape == third.shape == (9, 10)


def test_a_stack_that_needs_too_much_memory_is_halved_and_reported_once(stacks, monkeypatch, capsys):
    stacked = Prediction.stacked

    def limited(requests):
        if len(requests) > 2:
            raise torch.OutOfMemoryError("of the GPU")
        return stacked(requests)

    monkeypatch.setattr(Prediction, "stacked", staticmethod(limited))
    made = requests(5)
    results = together.execute(made) and together.execute(made)
    assert stacks == [2, 2, 1] * 2
    assert capsys.readouterr().err.count("too little memory for 5 clients") == 1
    assert all(torch.allclose(each.alone(), result, atol=1e-5) for each, result in zip(made, results, strict=True))


def test_kept_stacks_are_freed_before_a_stack_is_halved(stacks, monkeypatch, capsys):
    stacked, calls = Prediction.stacked, []

    def limited(requests):
        calls.append(len(requests))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("of the GPU")
        return stacked(requests)

    made = requests(3)
    expected = together.execute(made)
    monkeypatch.setattr(Prediction, "stacked", staticmethod(limited))
    assert all(map(torch.equal, together.execute(made), expected))
    assert calls == [3, 3]
    assert not capsys.readouterr().err


def test_no_more_clients_than_fit_into_the_memory_of_the_gpu(stacks, monkeypatch):
    """Two networks of float32 for each client; in training also what the backward pass needs."""
    made = requests(5)
    weights, image = kinds.bytes_of(made[0].network, 32, 32)
    assert weights == sum(4 * tensor.numel() for tensor in made[0].weights.values())
    assert kinds.bytes_of(made[0].network, 64, 64)[1] > 3 * image
    # The input and the output of each convolution, in float32, are among what is needed.
    assert image > 4 * (3 * 32 * 32 + 4 * 32 * 32)
    monkeypatch.setattr(graphs, "memory", lambda _: 5 * weights)
    together.execute(made)
    assert stacks == [2, 2, 1]
    experiment = prepare(tiny(validation=1300))
    trainer, client = experiment.setup.trainer, experiment.client(0, 1, {})
    monkeypatch.setattr(graphs, "memory", lambda _: 10 * weights + 2 * trainer.config.batch_size * image)
    del stacks[:]
    results = list(together.run([lambda: trainer.train(client, made[0].weights)] * 2))
    assert stacks == [1, 1]
    assert equal(*results)
    # Teachers take memory, too.
    monkeypatch.setattr(graphs, "memory", lambda _: 2 * (10 * weights + 2 * trainer.config.batch_size * image))
    for teachers, expected in (((), [2]), ((made[0].weights,), [1, 1])):
        objective = _of_first if teachers else F.cross_entropy
        options = {"objective": objective, "teachers": teachers}
        del stacks[:]
        list(together.run([lambda options=options: trainer.train(client, made[0].weights, **options)] * 2))
        assert stacks == expected


def _of_first(outputs, labels):
    return F.cross_entropy(outputs[0], labels)


@pytest.mark.parametrize(
    ("method", "optimizer", "schedule", "count"),
    [
        ("fedmd", "adamw", "cosine", 3),
        ("moon", "sgd", "cosine", 2),
        ("fedgen", "sgd", "constant", 2),
        slow("fedmd", "sgd", "constant", 3),
        slow("fedmd", "sgd", "cosine", 3),
        slow("fedntd", "sgd", "constant", 2),
        slow("fedhkd", "sgd", "constant", 2),
    ],
)
def test_a_step_is_recorded_once_in_a_run(method, optimizer, schedule, count, stacks, tmp_path, monkeypatch):
    """Of the clients and of the server, for all rounds; the results are those of a run without recordings."""
    options = {"validation": 1300, "algorithm": method, "rounds": 3, "batch_size": 32}
    options |= {"optimizer": optimizer, "schedule": schedule}
    expected, steps = simulated(tmp_path / "one", **options), []
    graphs.forget()
    monkeypatch.setattr(graphs, "recorder", lambda _: lambda run: (steps.append(run), run)[1])
    assert simulated(tmp_path / "other", **options) == expected
    assert len(steps) == count


@pytest.mark.parametrize("is_together", [True, False])
def test_a_training_that_failed_leaves_no_gradients(is_together, stacks, monkeypatch):
    """The next client with this network has the same result as before."""
    monkeypatch.setattr(together, "pays", lambda _: is_together)
    failing, sgd = [], optimizers.sgd

    def optimizer(*arguments):
        step = sgd(*arguments)

        def failing_step(rate):
            if failing:
                raise ArithmeticError
            step(rate)

        return failing_step

    monkeypatch.setattr(optimizers, "sgd", optimizer)
    experiment = prepare(tiny(validation=1300))
    trainer, client = experiment.setup.trainer, experiment.client(0, 1, {})
    start = trainer.initial_weights(client.model)
    expected = trainer.train(client, start)
    failing.append(True)
    with pytest.raises(ArithmeticError):
        trainer.train(client, start)
    failing.clear()
    assert equal(trainer.train(client, start), expected)


def test_a_signal_ends_the_run(stacks, monkeypatch):
    def ended(requests):
        raise Terminated(143)

    monkeypatch.setattr(Prediction, "stacked", staticmethod(ended))
    with pytest.raises(Terminated):
        together.execute(requests(2))


def test_a_memory_that_cannot_be_written_ends_the_run(stacks, tmp_path, monkeypatch):
    def failing(*_):
        raise StorageError("No space left on device: memories.")

    monkeypatch.setattr(ClientRunner, "run", failing)
    with pytest.raises(StorageError, match="No space"):
        simulate(tiny(out=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"client_timeout": 60.0}, "--client-timeout"),
        ({"workers": "2"}, "--workers 2"),
        ({"faults": "crash=0.01"}, "--f"),
    ],
)
def test_options_that_need_processes_are_named(changes, option, stacks, tmp_path, capsys):
    simulate(tiny(out=str(tmp_path / "run"), validation=1300, rounds=1, min_clients=1, **changes))
    assert set(stacks) == {1}  # on the server
    assert f"fedkd: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "expected"), [(0, 3), (1, 1)])
def test_clients_with_few_steps_compute_on_their_own(missing, expected, stacks, tmp_path, monkeypatch):
    """Whatever the number of rounds, so that a run that is extended has the same bits."""
    experiment = prepare(tiny(validation=1300, local_epochs=2))
    clients = [experiment.client(k, 1, {}) for k in range(experiment.clients)]
    steps = sum(map(experiment.setup.trainer.steps, clients))
    monkeypatch.setattr("fedkd.simulate.experiment.FEWEST_STEPS", steps + missing)
    simulated(tmp_path / "run", validation=1300, local_epochs=2)
    assert max(stacks) == expected


def test_requests_outside_of_a_round_are_executed_at_once(stacks):
    experiment = prepare(tiny(validation=1300))
    client, trainer = experiment.client(0, 1, {}), experiment.setup.trainer
    start = trainer.initial_weights(client.model)
    own = trainer.train(client, start, objective=F.cross_entropy)
    one, other = together.run([lambda: trainer.train(client, start)] * 2)
    assert stacks == [1, 2]
    assert all((one[name] - own[name]).abs().max() < 1e-2 for name in own)
    assert equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ensemble:downlink=labels", "scaffold", "mentor:model=cnn:width=4,term=features"])
def test_on_a_gpu_two_runs_give_the_same_bits_and_almost_those_of_the_plain_path(method, tmp_path, monkeypatch):
    changes = {"validation": 1300, "clients": 5, "learning_rate": 1e-3, "algorithm": method, "device": "cuda"}
    first, again = (simulated(tmp_path / name, **changes) for name in ("first", "again"))
    assert first == again
    monkeypatch.setattr(together, "pays", lambda _: False)
    plain = simulated(tmp_path / "plain", **changes)
    assert by_bytes(first) == by_bytes(plain)
    assert first[-1]["test_loss"] == pytest.approx(plain[-1]["test_loss"], abs=1e-2)
