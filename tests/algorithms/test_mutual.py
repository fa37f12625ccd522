"""FML and FedKD, whose clients train two networks together, against their papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedkd.algorithms.fml import FML, FedKD
from fedkd.core.tensors import put, shapes, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models, together
from tests.algorithms.test_methods import one_round
from tests.conftest import tiny

MENTOR = "cnn:width=4"
SLOW = {"clients": 12, "local_epochs": 2, "norm": "batch", "augment": "true", "partitioner": "dirichlet:alpha=0.3"}


def fmls_loss(own, other, labels):
    """CE + KL(other || own)."""
    p = other.detach().softmax(1)
    return F.cross_entropy(own, labels) + (p * (p.log() - own.log_softmax(1))).sum(1).mean()


def fedkds_loss(own, other, labels):
    """CE + KL(other || own) / (CE of both), as a function of the own network."""
    p, cost = other.detach().softmax(1), F.cross_entropy(own, labels)
    distance = (p * (p.log() - own.log_softmax(1))).sum(1).mean()
    return cost + distance / (cost + F.cross_entropy(other.detach(), labels))


def slowly_trained(setup, client, starts, loss_of):
    """Both networks, each by an SGD of its own on its own loss, on the same batches."""
    networks = []
    for spec, weights in starts:
        module = models.build(spec, setup.classes, setup.config.norm).to(memory_format=torch.channels_last)
        module.load_state_dict(weights)
        networks.append(module.train())
    config, generator = setup.config, torch.Generator().manual_seed(client.derive("fit"))
    steps = [torch.optim.SGD(module.parameters(), config.learning_rate, config.momentum) for module in networks]
    sizes = loop.batch_sizes(networks[0], len(client.data), config.batch_size)
    for _ in range(config.local_epochs):
        for rows in loop.batches(sizes, generator):
            augmentation = loop.Augmentation(config.augment, setup.trainer.flip)
            x = setup.trainer.scaling(augmentation(client.data.pixels[rows], rows, generator))
            both = [module(x) for module in networks]
            losses = [loss_of(both[k], both[1 - k], client.data.labels[rows]) for k in (0, 1)]
            for loss, sgd in zip(losses, steps, strict=True):
                sgd.zero_grad()
                loss.backward()
            for sgd in steps:
                sgd.step()
    return [{name: tensor.detach().clone() for name, tensor in module.state_dict().items()} for module in networks]


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize(("name", "loss_of"), [("fml", fmls_loss), ("fedkd-wu", fedkds_loss)])
def test_both_networks_learn_as_in_the_paper(name, loss_of, is_together, monkeypatch):
    """In a client's second round, which continues its mentor; on its own and in a stack."""
    monkeypatch.setattr(together, "pays", lambda _: is_together)
    experiment = prepare(tiny(algorithm=f"{name}:model={MENTOR}", **SLOW))
    algorithm, setup, clients = experiment.algorithm, experiment.setup, (2, 5)
    first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {}, clients)
    updates, memories, _ = one_round(experiment, algorithm, 2, first[2], first[1], clients)
    for number in clients:
        assert shapes(updates[number].tensors) == algorithm.upload_spec(setup, number, 2)
        starts = [(setup.student, first[2]), (MENTOR, take("mentor", first[1][number]))]
        student, mentor = slowly_trained(setup, experiment.client(number, 2, {}), starts, loss_of)
        expected = {**put("model", student), **put("mentor", mentor)}
        assert memories[number].keys() == expected.keys()
        before = {**put("model", first[2]), **put("mentor", starts[1][1])}
        moved = max((expected[key].float() - before[key].float()).abs().max() for key in expected)
        for key, tensor in memories[number].items():
            assert torch.allclose(tensor.float(), expected[key].float(), atol=2e-3 * float(moved), rtol=1e-3), key
        assert all(torch.equal(updates[number].tensors[key], memories[number][f"model/{key}"]) for key in student)


def test_the_losses_of_known_logits():
    """Probabilities (1/2, 1/2) and (3/4, 1/4): KL is 3/4 ln(3/2) - 1/4 ln 2 one way, 1/2 ln(4/3) the other way."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    costs, distances = math.log(2) + math.log(4 / 3), 0.1308120359 + 0.1438410362
    labels = torch.tensor([0])
    assert float(FML().objective(logits, labels)) == pytest.approx(costs + distances, abs=1e-6)
    assert float(FedKD().objective(logits, labels)) == pytest.approx(costs + distances / costs, abs=1e-6)


def test_certain_networks_have_a_finite_gradient():
    """Where both cross-entropies round to zero, FedKD divides zero by zero."""
    logits = torch.tensor([[[200.0, 0.0], [300.0, 0.0]]], requires_grad=True)
    loss = FedKD().objective(logits, torch.tensor([0]))
    loss.backward()
    assert loss.detach().item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_mentor_stays_on_its_client_and_starts_from_its_memory():
    experiment = prepare(tiny())
    setup, algorithm = experiment.setup, FML(model=MENTOR)
    start = setup.trainer.initial_weights(setup.student)
    _, memory = algorithm.local_update(setup, experiment.client(0, 1, {}), start)
    update, again = algorithm.local_update(setup, experiment.client(0, 2, memory), start)
    assert set(update.tensors) == set(start)
    _, fresh = algorithm.local_update(setup, experiment.client(0, 2, {}), start)
    assert not torch.equal(again["mentor/0.0.weight"], fresh["mentor/0.0.weight"])
