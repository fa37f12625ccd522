"""No two trainings of a run share a seed, and a run with another ``--seed`` shares none of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedkd.algorithms import ensemble, fedmd, kt_pfl
from fedkd.core import seeds, tensors
from fedkd.core.communication.replies import Reply
from fedkd.core.soft_labels import SoftLabels
from fedkd.simulate import rounds
from fedkd.simulate.experiment import Experiment, prepare
from fedkd.simulate.rounds import SerializedBytes, sample
from fedkd.training import loop
from fedkd.training.trainer import Trainer
from tests.conftest import simulated, tiny

#: The modules that call ``distill_locally``.
DISTILLING = (ensemble, fedmd, kt_pfl)


@dataclass(frozen=True)
class Training:
    """One call of `loop.train`: its purpose, round, client (None: the server) and seed."""

    purpose: str
    round: int
    client: int | None
    seed: int


class Recorder:
    """Records every training in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainings: list[Training] = []
        self.round, self.purpose, self.client = 0, "server", None
        self._record_rounds(monkeypatch)
        real = loop.train

        def train(*arguments, seed, **options):
            self.trainings.append(Training(self.purpose, self.round, self.client, seed))
            return real(*arguments, seed=seed, **options)

        monkeypatch.setattr(loop, "train", train)
        for name in ("train", "train_with_teacher"):
            monkeypatch.setattr(Trainer, name, self._within("fit", getattr(Trainer, name)))
        for module in DISTILLING:
            monkeypatch.setattr(module, "distill_locally", self._within("digest", ensemble.distill_locally))

    def _record_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The round is that of the last client; the server update follows the clients."""
        real = Experiment.client

        def client(experiment, number, round_number, *arguments):
            self.round = round_number
            return real(experiment, number, round_number, *arguments)

        monkeypatch.setattr(Experiment, "client", client)

    def _within(self, purpose, real):
        def method(first, client, *arguments, **options):
            self.purpose, self.client = purpose, client.id
            try:
                return real(first, client, *arguments, **options)
            finally:
                self.purpose, self.client = "server", None

        return method

    def seeds(self, purpose: str) -> dict[tuple[int, int | None], int]:
        """Seeds by round and client."""
        chosen = [t for t in self.trainings if t.purpose == purpose]
        by_client = {(t.round, t.client): t.seed for t in chosen}
        assert len(by_client) == len(chosen)
        return by_client

    @property
    def all(self) -> list[int]:
        return [training.seed for training in self.trainings]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def exchange_of(experiment):
    """Local updates in this process, with the memories of the clients."""
    memories = {}

    def exchange(kind, number, messages, expected=None):
        assert kind == "train"
        for client, arrays in messages.items():
            sampled = experiment.client(client, number, memories.get(client, {}))
            message = experiment.channel.decode_message(arrays, {})
            update, memories[client] = experiment.algorithm.local_update(experiment.setup, sampled, message.tensors)
            yield Reply(client, update, "", SerializedBytes())

    return exchange


FEW = {"partitioner": "tests.simulate.partitions:sixteen"}


def train(**changes):
    """The rounds of a run without files and messages."""
    experiment = prepare(tiny(**{**FEW, "model": "cnn:width=4", **changes}))
    exchange = exchange_of(experiment)
    return list(
        rounds.run_rounds(experiment.algorithm, experiment.setup, exchange, experiment.clients, experiment.channel)
    )


def test_every_training_of_a_run_has_another_seed(recorder, tmp_path):
    """A whole run: local training, local distillation from the second round on, and distillation on the server."""
    simulated(tmp_path / "run", algorithm="ensemble:downlink=labels", rounds=3, evaluate_every=9, **FEW)
    clients = range(3)
    assert set(recorder.seeds("fit")) == {(number, client) for number in (1, 2, 3) for client in clients}
    assert set(recorder.seeds("digest")) == {(number, client) for number in (2, 3) for client in clients}
    assert set(recorder.seeds("server")) == {(number, None) for number in (1, 2, 3)}
    assert [seed for seed, count in Counter(recorder.all).items() if count > 1] == []


@pytest.mark.parametrize("purpose", ["fit", "digest"])
def test_clients_of_one_round_and_rounds_of_one_client_have_different_seeds(recorder, purpose):
    train(algorithm="ensemble:downlink=labels", rounds=4, clients=4)
    by_client = recorder.seeds(purpose)
    first = 1 if purpose == "fit" else 2
    for number in range(first, 5):
        assert len({by_client[number, client] for client in range(4)}) == 4
    for client in range(4):
        assert len({by_client[number, client] for number in range(first, 5)}) == 5 - first
    assert len(set(recorder.seeds("server").values())) == 4, "the server has another seed in every round"
    assert not set(recorder.seeds("fit").values()) & set(recorder.seeds("digest").values())


@pytest.mark.parametrize(
    ("algorithm", "count"),
    [
        ("local", 6),
        ("fedavg", 6),
        ("fedmd", 6 + 3),
        ("dsfl", 6 + 3 + 2),
        ("kt-pfl", 6 + 3),
        ("fedproto", 6),
        ("feddf", 6 + 2 * 2),
        ("fed-et", 6 + 2),
        ("central", 2),
    ],
)
def test_no_method_trains_twice_with_one_seed(recorder, algorithm, count):
    """Of feddf the server distills a model of each architecture."""
    models = "cnn:width=4,cnn:width=6" if algorithm == "feddf" else "cnn:width=4"
    train(algorithm=algorithm, model=models, rounds=2)
    assert len(recorder.all) == count
    assert len(set(recorder.all)) == count


def test_seeds_are_derived_from_run_purpose_round_and_client(recorder):
    """Written out, since another purpose changes every number of every run."""
    train(algorithm="ensemble:downlink=labels", rounds=2, seed=7)
    of_clients = {
        (number, client): seeds.derive(7, "client", number, client) for number in (1, 2) for client in range(3)
    }
    assert recorder.seeds("fit") == {key: seeds.derive(seed, "fit") for key, seed in of_clients.items()}
    assert recorder.seeds("digest") == {
        key: seeds.derive(seed, "digest") for key, seed in of_clients.items() if key[0] == 2
    }
    assert recorder.seeds("server") == {(number, None): seeds.derive(7, "tell", number) for number in (1, 2)}


def test_another_seed_shares_no_seed_of_training(recorder):
    options = {"algorithm": "ensemble:downlink=labels", "rounds": 2}
    found = {}
    for seed in (0, 1, 2):
        recorder.trainings.clear()
        train(**options, seed=seed)
        found[seed] = set(recorder.all)
        assert len(found[seed]) == 6 + 3 + 2
    assert len(found[0] | found[1] | found[2]) == 3 * 11


def test_repetitions_have_different_seeds_and_methods_share_them(recorder, tmp_path):
    simulated(tmp_path / "run", algorithm="fedavg", compare="local", seeds=2, rounds=1, **FEW)
    seen = [training.seed for training in recorder.trainings]
    assert len(seen) == 2 * 2 * 3
    first, second = seen[:6], seen[6:]
    assert first[:3] == first[3:], "methods are compared on the same batches"
    assert second[:3] == second[3:]
    assert not set(first) & set(second)


def test_training_on_proxy_images_too_has_different_seeds_per_client_and_round(recorder):
    experiment = prepare(tiny(model="cnn:width=4", **FEW))
    setup, found = experiment.setup, {}
    weights = setup.trainer.initial_weights("cnn:width=4")
    soft = SoftLabels(setup.proxy.images[:4], torch.full((4, 10), 0.1))
    for number, who in ((1, 0), (1, 1), (2, 0)):
        client = experiment.client(who, number, {})
        setup.trainer.train(client, weights, soft_labels=soft, soft_objective=setup.distillation.objective)
        found[number, who] = recorder.trainings[-1].seed
        assert found[number, who] == seeds.derive(client.seed, "fit")
    assert len(set(found.values())) == 3


def test_parameters_of_a_loss_term_are_initialized_with_a_seed_per_client(recorder, monkeypatch):
    """The adapters of mentor: not from the generator of the batches."""
    drawn, real = [], seeds.seeded

    def seeded(seed):
        drawn.append(seed)
        return real(seed)

    monkeypatch.setattr(seeds, "seeded", seeded)
    experiment = prepare(tiny(algorithm="mentor:model=cnn:width=4", model="cnn:width=4", **FEW))
    drawn.clear()
    for number, who in ((1, 0), (1, 1), (2, 0)):
        algorithm, setup = experiment.algorithm, experiment.setup
        client = experiment.client(who, number, {})
        algorithm.local_update(setup, client, algorithm.broadcast(setup, algorithm.initial_state(setup), who))
    initial = seeds.derive(0, "initial", "cnn:width=4")
    assert initial in drawn
    adapters = [seed for seed in drawn if seed != initial]
    assert len(adapters) == len(set(adapters)) == 3
    assert not set(adapters) & set(recorder.all)


# Sampled clients.


def test_other_clients_are_sampled_in_every_round(recorder):
    done = train(algorithm="local", clients=8, participation=0.5, rounds=6, seed=2)
    trained = {number: [client for r, client in recorder.seeds("fit") if r == number] for number in range(1, 7)}
    chosen = [tuple(sorted(trained[number])) for number in range(1, 7)]
    assert [len(clients) for clients in chosen] == [4] * 6
    assert chosen == [tuple(sample(8, 0.5, 2, number)) for number in range(1, 7)]
    assert chosen == [tuple(round_.updates) for round_ in done]
    assert len(set(chosen)) >= 5, "70 samples of clients are equally likely"
    recorder.trainings.clear()
    train(algorithm="local", clients=8, participation=0.5, rounds=6, seed=3)
    others = {number: {client for r, client in recorder.seeds("fit") if r == number} for number in range(1, 7)}
    assert [tuple(sorted(others[number])) for number in range(1, 7)] != chosen


def test_pooled_data_is_that_of_the_clients_of_the_round():
    experiment = prepare(tiny(algorithm="central", clients=8, participation=0.5, seed=2))
    pooled = []
    for number in (1, 2, 3, 4, 5):
        rows = experiment.client(0, number, {}).data.labels
        expected = np.concatenate([experiment.partition[client] for client in sample(8, 0.5, 2, number)])
        assert torch.equal(rows, experiment.train.labels[torch.from_numpy(expected)])
        pooled.append(tuple(expected.tolist()))
    assert len(set(pooled)) >= 4, "70 samples of clients are equally likely"


# Other random numbers of a run.


def test_initial_weights_depend_on_seed_and_model_only(monkeypatch):
    drawn, real = [], seeds.seeded

    def seeded(seed):
        drawn.append(seed)
        return real(seed)

    monkeypatch.setattr(seeds, "seeded", seeded)
    setups = [prepare(tiny(seed=seed)).setup for seed in (0, 1)]
    drawn.clear()
    initial = [
        setup.trainer.initial_weights(model)
        for setup in setups
        for model in ("cnn:width=4", "cnn:width=6", "cnn:width=4")
    ]
    assert drawn[0] == drawn[2]
    assert drawn[3] == drawn[5]
    assert len(set(drawn)) == 4
    assert tensors.equal(initial[0], initial[2])
    assert not tensors.equal(initial[0], initial[3])


def test_the_proxy_samples_of_a_round_depend_on_the_round_and_the_seed():
    setups = [prepare(tiny(proxy="holdout:size=100", proxy_samples=10, seed=seed)).setup for seed in (0, 0, 1)]
    found = [[tuple(setup.proxy.subset(number).tolist()) for number in range(1, 6)] for setup in setups]
    assert found[0] == found[1]
    assert len(set(found[0] + found[2])) == 10


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet:alpha=0.5"])
def test_proxy_and_partition_depend_on_the_seed(partitioner):
    experiments = [prepare(tiny(seed=seed, partitioner=partitioner)) for seed in (0, 1)]
    assert len({tuple(one.proxy_rows.tolist()) for one in experiments}) == 2
    # Positions among the private samples depend on the seed of the partition only.
    private = [np.setdiff1d(np.arange(len(one.train)), one.proxy_rows) for one in experiments]
    places = [
        tuple(np.searchsorted(rows, one.partition[0]).tolist()) for rows, one in zip(private, experiments, strict=True)
    ]
    assert len(set(places)) == 2
