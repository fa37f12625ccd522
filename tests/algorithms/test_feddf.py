"""FedDF's worst clients: which of them are dropped, and what the server computes without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkd.algorithms.base import Update
from fedkd.algorithms.feddf import FedDF, kept
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal
from fedkd.simulate.checks import check
from fedkd.simulate.experiment import prepare
from tests.conftest import tiny


def by_the_code(percentages, classes):
    """What the authors' code does (`drop_worst`), in its own steps: FedAvg first, then the teachers."""
    chance = 1 / classes * 100 * 1.2
    averaged = [i for i, each in enumerate(percentages) if not each < chance]
    shares = [0 if each < chance else each for each in percentages]
    shares = [each / sum(shares) for each in shares]
    if len(averaged) < len(percentages):
        return averaged, [i for i, share in enumerate(shares) if share > 0]
    others = list(shares)
    others.remove(max(others))
    return averaged, [i for i, share in enumerate(shares) if share >= np.mean(others) - 1.5 * np.std(others)]


def test_the_clients_of_the_authors_code_are_kept():
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(300):
        worst = rng.choice([1, 15, 40])
        percentages = np.round([*rng.uniform(40, 50, size=rng.integers(1, 9)), worst, 55], 1)
        wanted = by_the_code(percentages.tolist(), 10)
        accuracies = {client: each / 100 for client, each in enumerate(percentages.tolist())}
        assert kept(accuracies, 10) == wanted
        kinds.add((worst, *(len(each) < len(percentages) for each in wanted)))
    assert {(1, True, True), (15, False, True), (40, False, False)} <= kinds


def test_clients_that_all_guess_are_all_kept():
    assert kept({3: 0.1, 7: 0.05}, 10) == ([3, 7], [3, 7])
    assert kept({3: 0.9}, 10) == ([3], [3])


@pytest.fixture(scope="module")
def experiment():
    return prepare(tiny(algorithm="feddf", validation=100, clients=6))


def trained(experiment, noise):
    """Clients that are as good as each other, up to noise on their weights."""
    trainer, clients = experiment.setup.trainer, [experiment.client(c, 1, {}) for c in range(6)]
    weights = trainer.initial_weights("cnn:width=8")
    for client in clients:
        weights = trainer.train(client, weights)
    generator = torch.Generator().manual_seed(0)
    return {
        client.id: Update(
            {n: w + size * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}, 9
        )
        for client, size in zip(clients, noise, strict=True)
    }


def test_a_client_that_guesses_is_neither_averaged_nor_in_the_ensemble(experiment):
    setup, updates = experiment.setup, trained(experiment, [0.0] * 6)
    rarest = setup.validation.labels.bincount(minlength=10).argmin()
    constant = {name: torch.zeros_like(tensor) for name, tensor in updates[4].tensors.items()}
    list(constant.values())[-1][rarest] = 1.0  # the bias of the last layer
    updates[4] = Update(constant, 9)
    others = {client: update for client, update in updates.items() if client != 4}
    state = FedDF().initial_state(setup)
    wanted, all_of_them = (FedDF().aggregate(setup, state, each, 7) for each in (others, updates))
    assert equal(FedDF(drop=True).aggregate(setup, state, updates, 7), wanted)
    assert not equal(all_of_them, wanted)


def test_an_outlier_is_only_averaged(experiment):
    setup, updates = experiment.setup, trained(experiment, [0.1, 0.1, 0.1, 0.1, 0.1, 0.7])
    averaged, ensemble = FedDF(drop=True).selected(setup, updates)
    assert (list(averaged), list(ensemble)) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4])


def test_it_needs_validation_samples():
    with pytest.raises(UsageError, match="feddf:drop=true needs --validation"):
        check(tiny(algorithm="feddf:drop=true"))
    check(tiny(algorithm="feddf:drop=true", validation=5))
    check(tiny(algorithm="feddf"))
