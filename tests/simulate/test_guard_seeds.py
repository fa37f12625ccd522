"""Guards for seeds: no two trainings of a run share one, and another ``--seed`` shares none of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedkd.training import trainer as kit_module
from fedkd.training import loop
from fedkd.simulate import rounds
from fedkd.core import seeds, tensors
from fedkd.simulate.experiment import Experiment, prepare
from fedkd.algorithms.base import Setup
from fedkd.simulate.rounds import Reply, SerializedBytes, sample
from tests.conftest import simulated, tiny


@dataclass(frozen=True)
class Training:
    """One call of `loop.train`: what for, in which round, of which client (None: the server), with which seed."""

    purpose: str
    round: int
    client: int | None
    seed: int


class Recorder:
    """Notes every training in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainings: list[Training] = []
        self.round, self.purpose, self.client = 0, "server", None
        self._watch_clients(monkeypatch)
        real = loop.train

        def train(*given, seed, **options):
            self.trainings.append(Training(self.purpose, self.round, self.client, seed))
            return real(*given, seed=seed, **options)

        monkeypatch.setattr(loop, "train", train)
        for name in ("fit", "fit_jointly", "fit_taught", "digest"):
            monkeypatch.setattr(Setup, name, self._within(name, getattr(Setup, name)))

    def _watch_clients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The round is that of the client that was made last; the server follows its clients."""
        real = Experiment.client

        def client(experiment, number, round_number, *given):
            self.round = round_number
            return real(experiment, number, round_number, *given)

        monkeypatch.setattr(Experiment, "client", client)

    def _within(self, purpose, real):
        def method(setup, client, *given, **options):
            self.purpose, self.client = purpose, client.id
            try:
                return real(setup, client, *given, **options)
            finally:
                self.purpose, self.client = "server", None

        return method

    def seeds(self, purpose: str) -> dict[tuple[int, int | None], int]:
        """By round and client."""
        chosen = [t for t in self.trainings if t.purpose == purpose]
        found = {(t.round, t.client): t.seed for t in chosen}
        assert len(found) == len(chosen)
        return found

    @property
    def all(self) -> list[int]:
        return [training.seed for training in self.trainings]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def exchange_of(experiment):
    """The clients' side of the round loop, in this process, with their memories."""
    memories = {}

    def exchange(kind, number, requests):
        assert kind == "train"
        for client, arrays in requests.items():
            held = experiment.client(client, number, memories.get(client, {}))
            request = experiment.channel.decode_request(arrays, {})
            update, memories[client] = experiment.algorithm.local_update(experiment.setup, held, request.tensors)
            yield Reply(client, update, "", SerializedBytes())

    return exchange


def sixteen(labels, clients, rng):
    """A partitioner: 16 images a client, who trains in no time."""
    return np.split(rng.permutation(len(labels))[: 16 * clients], clients)


FEW = {"partitioner": f"{__name__}:sixteen"}


def train(**changes):
    """The rounds of a run without files and messages."""
    experiment = prepare(tiny(**{**FEW, "model": "cnn:width=4", **changes}))
    exchange = exchange_of(experiment)
    return list(rounds.run_rounds(experiment.algorithm, experiment.setup, exchange, experiment.clients, experiment.channel))


def test_every_training_of_a_run_has_a_seed_of_its_own(recorder, tmp_path):
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
    found = recorder.seeds(purpose)
    first = 1 if purpose == "fit" else 2
    for number in range(first, 5):
        assert len({found[number, client] for client in range(4)}) == 4
    for client in range(4):
        assert len({found[number, client] for number in range(first, 5)}) == 5 - first
    assert len(set(recorder.seeds("server").values())) == 4, "and the server has another one in every round"
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


def test_seeds_are_named_by_run_purpose_round_and_client(recorder):
    """Written out, since another name changes every number of every run."""
    train(algorithm="ensemble:downlink=labels", rounds=2, seed=7)
    own = {(number, client): seeds.derive(7, "client", number, client) for number in (1, 2) for client in range(3)}
    assert recorder.seeds("fit") == {key: seeds.derive(seed, "fit") for key, seed in own.items()}
    assert recorder.seeds("digest") == {key: seeds.derive(seed, "digest") for key, seed in own.items() if key[0] == 2}
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


def test_repetitions_of_one_run_have_seeds_of_their_own_and_methods_share_them(recorder, tmp_path):
    simulated(tmp_path / "run", algorithm="fedavg", compare="local", seeds=2, rounds=1, **FEW)
    seen = [training.seed for training in recorder.trainings]
    assert len(seen) == 2 * 2 * 3
    first, second = seen[:6], seen[6:]
    assert first[:3] == first[3:], "methods are compared on the same batches"
    assert second[:3] == second[3:]
    assert not set(first) & set(second)


def test_clients_that_train_on_proxy_images_too_have_their_own_seeds(recorder):
    experiment = prepare(tiny(model="cnn:width=4", **FEW))
    setup, found = experiment.setup, {}
    weights, rows = setup.trainer.initial_weights("cnn:width=4"), torch.arange(4)
    for number, who in ((1, 0), (1, 1), (2, 0)):
        client = experiment.client(who, number, {})
        setup.fit_jointly(client, weights, rows, torch.full((4, 10), 0.1), setup.distillation.objective)
        found[number, who] = recorder.trainings[-1].seed
        assert found[number, who] == seeds.derive(client.seed, "fit")
    assert len(set(found.values())) == 3


def test_what_a_term_learns_starts_from_a_seed_of_its_own(recorder, monkeypatch):
    """The adapters of mentor: drawn for each client, and not from the stream of its batches."""
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
    own = [seed for seed in drawn if seed != initial]
    assert len(own) == len(set(own)) == 3
    assert not set(own) & set(recorder.all)


# Who takes part.


def test_another_choice_of_clients_takes_part_in_every_round(recorder):
    done = train(algorithm="local", clients=8, participation=0.5, rounds=6, seed=2)
    trained = {number: [client for r, client in recorder.seeds("fit") if r == number] for number in range(1, 7)}
    chosen = [tuple(sorted(trained[number])) for number in range(1, 7)]
    assert [len(clients) for clients in chosen] == [4] * 6
    assert chosen == [tuple(sample(8, 0.5, 2, number)) for number in range(1, 7)]
    assert chosen == [tuple(round_.updates) for round_ in done]
    assert len(set(chosen)) >= 5, "70 choices are equally likely"
    recorder.trainings.clear()
    train(algorithm="local", clients=8, participation=0.5, rounds=6, seed=3)
    others = {number: {client for r, client in recorder.seeds("fit") if r == number} for number in range(1, 7)}
    assert [tuple(sorted(others[number])) for number in range(1, 7)] != chosen


def test_pooled_data_is_that_of_the_clients_of_the_round():
    experiment = prepare(tiny(algorithm="central", clients=8, participation=0.5, seed=2))
    held = []
    for number in (1, 2, 3, 4, 5):
        rows = experiment.client(0, number, {}).data.labels
        expected = np.concatenate([experiment.partition[client] for client in sample(8, 0.5, 2, number)])
        assert torch.equal(rows, experiment.train.labels[torch.from_numpy(expected)])
        held.append(tuple(expected.tolist()))
    assert len(set(held)) >= 4, "70 choices are equally likely"


# Other draws of a run.


def test_fresh_weights_follow_seed_and_model_but_neither_round_nor_client(monkeypatch):
    drawn, real = [], seeds.seeded

    def seeded(seed):
        drawn.append(seed)
        return real(seed)

    monkeypatch.setattr(seeds, "seeded", seeded)
    kits = [prepare(tiny(seed=seed)).setup for seed in (0, 1)]
    drawn.clear()
    initial = [setup.trainer.initial_weights(model) for setup in kits for model in ("cnn:width=4", "cnn:width=6", "cnn:width=4")]
    assert drawn[0] == drawn[2]
    assert drawn[3] == drawn[5]
    assert len(set(drawn)) == 4
    assert tensors.equal(initial[0], initial[2])
    assert not tensors.equal(initial[0], initial[3])
    assert kit_module.seeds is seeds


def test_the_proxy_images_of_a_round_follow_the_round_and_the_seed():
    kits = [prepare(tiny(proxy="holdout:size=100", proxy_samples=10, seed=seed)).setup for seed in (0, 0, 1)]
    found = [[tuple(setup.proxy.subset(number).tolist()) for number in range(1, 6)] for setup in kits]
    assert found[0] == found[1]
    assert len(set(found[0] + found[2])) == 10


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet:alpha=0.5"])
def test_proxy_and_partition_follow_the_seed(partitioner):
    made = [prepare(tiny(seed=seed, partitioner=partitioner)) for seed in (0, 1)]
    assert len({tuple(one.proxy_rows.tolist()) for one in made}) == 2
    # Positions in the private rows: these alone show the seed of the partition.
    private = [np.setdiff1d(np.arange(len(one.train)), one.proxy_rows) for one in made]
    places = [tuple(np.searchsorted(rows, one.dealt[0]).tolist()) for rows, one in zip(private, made, strict=True)]
    assert len(set(places)) == 2
