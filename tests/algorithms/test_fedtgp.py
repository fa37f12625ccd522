"""FedTGP: the server's prototypes against SGD written out, and what clients send."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedkd.algorithms.base import Update
from fedkd.core import specs
from fedkd.core.tensors import equal, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, prototypes
from tests.conftest import tiny

CLASSES, WIDTH = 4, 3


def uploads(generator):
    """Class means of three clients; class 3 is nobody's, and what is said of absent classes is garbage."""
    means = torch.randn(3, CLASSES, WIDTH, generator=generator)
    present = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]) > 0
    means[~present] = 1e6
    return means, present


def slow_gap(means, present):
    """The largest of the classes' smallest distances."""
    centers = {
        c: sum(m[c] for m, has in zip(means, present, strict=True) if has[c]) / int(present[:, c].sum())
        for c in range(CLASSES)
        if present[:, c].any()
    }
    return max(min(float((centers[a] - centers[b]).norm()) for b in centers if b != a) for a in centers)


@pytest.mark.parametrize("most", [100.0, 0.5, 0.0])
def test_prototypes_are_trained_as_in_the_paper(most, generator):
    """CE of -(distance + margin at the own class), over the uploaded class means in batches, by SGD."""
    means, present = uploads(generator)
    start = prototypes.initial_weights(CLASSES, WIDTH, seed=7)
    weights, ours = prototypes.trained(
        start, means, present, margin=most, learning_rate=0.1, batch_size=3, epochs=5, device="cpu", seed=11
    )
    vectors = nn.Parameter(start["vectors.weight"].clone())
    hidden, out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    hidden.load_state_dict({name: start[f"layers.0.{name}"] for name in ("weight", "bias")})
    out.load_state_dict({name: start[f"layers.2.{name}"] for name in ("weight", "bias")})
    sgd = torch.optim.SGD([vectors, *hidden.parameters(), *out.parameters()], 0.1)
    rows = [(means[k, c], c) for k in range(3) for c in range(CLASSES) if present[k, c]]
    margin, batches = min(slow_gap(means, present), most), torch.Generator().manual_seed(11)
    assert (margin < most) == (most == 100)
    for _ in range(5):
        for batch in loop.batches([3, 3, 1], batches):
            losses = []
            for row in batch.tolist():
                z, label = rows[row]
                centers = [out(hidden(vectors[c]).relu()) for c in range(CLASSES)]
                scores = torch.stack([-(z - p).norm() - margin * (c == label) for c, p in enumerate(centers)])
                losses.append(-scores.log_softmax(0)[label])
            sgd.zero_grad()
            torch.stack(losses).mean().backward()
            sgd.step()
    with torch.no_grad():
        expected = torch.stack([out(hidden(vectors[c]).relu()) for c in range(CLASSES)])
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(weights["vectors.weight"], vectors, atol=1e-5)
    assert not torch.allclose(
        ours,
        prototypes.trained(
            start, means, present, margin=most, learning_rate=0.1, batch_size=3, epochs=0, device="cpu", seed=11
        )[1],
        atol=1e-2,
    )


def test_the_gap_of_known_class_means():
    """Classes at 0, 3 and 10 on a line: the nearest others are 3, 3 and 7 away."""
    means = torch.tensor([[[0.0], [2.0], [99.0]], [[99.0], [4.0], [10.0]]])
    present = torch.tensor([[True, True, False], [False, True, True]])
    assert prototypes.largest_gap(means, present) == 7
    assert prototypes.largest_gap(means, torch.tensor([[True, False, False]] * 2)) == math.inf


def test_one_class_alone_has_the_largest_margin(generator):
    means, present = uploads(generator)
    present[:, 1:] = False
    ours = prototypes.trained(
        prototypes.initial_weights(CLASSES, WIDTH, 0),
        means,
        present,
        margin=2.0,
        learning_rate=0.1,
        batch_size=3,
        epochs=1,
        device="cpu",
        seed=0,
    )[1]
    assert ours.isfinite().all()


def test_the_margin_of_known_distances():
    """-log(e^-3 / (e^-3 + e^-2)) with a distance of 1, a margin of 2 and another class at a distance of 2."""
    loss = prototypes.with_margin(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), margin=2.0)
    assert float(loss) == pytest.approx(1.3132616875, abs=1e-6)


def test_clients_send_which_classes_they_have_and_no_counts():
    experiment = prepare(tiny(partitioner="dirichlet:alpha=0.1"))
    setup, algorithm, fedproto = (
        experiment.setup,
        specs.call("algorithm", "fedtgp"),
        specs.call("algorithm", "fedproto"),
    )
    state, client = algorithm.initial_state(setup), experiment.client(0, 1, {})
    assert algorithm.broadcast(setup, state, 0) == {}
    update, memory = algorithm.local_update(setup, client, {})
    known, kept = fedproto.local_update(setup, client, fedproto.initial_state(setup))
    assert set(update.tensors) == {"prototypes", "present"}
    assert equal(memory, kept)
    assert torch.equal(update.tensors["prototypes"], known.tensors["prototypes"])
    assert update.tensors["present"].tolist() == [int((client.data.labels == c).any()) for c in range(10)]
    assert 0 < update.tensors["present"].sum() < 10
    assert algorithm.check_update(setup, update) == ""
    wrong = Update({**update.tensors, "present": update.tensors["present"] + 1}, update.examples)
    assert "neither" in algorithm.check_update(setup, wrong)


def test_clients_learn_the_trained_prototypes_of_all_classes():
    """In the next round, with fedproto's loss; the network goes on from its state."""
    experiment = prepare(tiny(algorithm="fedtgp:server_epochs=3,weight=2"))
    setup, algorithm, fedproto = experiment.setup, experiment.algorithm, specs.call("algorithm", "fedproto:weight=2")
    start = algorithm.initial_state(setup)
    update, memory = algorithm.local_update(setup, experiment.client(0, 1, {}), {})
    state = algorithm.aggregate(setup, start, {0: update}, seed=1)
    assert not equal(take("network", state), take("network", start))
    message = algorithm.broadcast(setup, state, 0)
    assert list(message) == ["prototypes"]
    client = experiment.client(0, 2, memory)
    _, ours = algorithm.local_update(setup, client, message)
    _, theirs = fedproto.local_update(setup, client, {**message, "counts": torch.ones(10, dtype=torch.int64)})
    assert equal(ours, theirs)
    _, without = fedproto.local_update(setup, client, {**message, "counts": torch.zeros(10, dtype=torch.int64)})
    assert not equal(ours, without)
