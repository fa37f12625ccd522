"""Options of training, from the command line to the weights, against loops with PyTorch's own classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedkd import models
from fedkd.core import seeds
from fedkd.core.errors import UsageError
from fedkd.simulate.checks import check
from fedkd.simulate.experiment import prepare
from tests.conftest import tiny

TRAINED = {"clients": 12, "batch_size": 50, "local_epochs": 2, "augment": False, "rounds": 8}


def module_of(setup, weights):
    module = models.build(setup.student, setup.classes, setup.config.norm)
    module.load_state_dict(weights)
    return module.to(memory_format=torch.channels_last).train()


def descended(experiment, client, optimizer, epochs=2):
    """The weights after local training by an optimizer of torch.optim."""
    setup = experiment.setup
    module = module_of(setup, setup.trainer.initial_weights(setup.student))
    optimizer, generator = (
        optimizer(module.parameters()),
        torch.Generator().manual_seed(seeds.derive(client.seed, "fit")),
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(client.data), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(
                module(setup.trainer.scaling(client.data.pixels[rows])), client.data.labels[rows]
            ).backward()
            optimizer.step()
    return module.state_dict()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, 0.8, weight_decay=0.1),
    "sgd:nesterov=true": lambda p: torch.optim.SGD(p, 0.01, 0.8, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw:beta1=0.5,beta2=0.9": lambda p: torch.optim.AdamW(p, 0.01, (0.5, 0.9), weight_decay=0.1),
}


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_clients_train_by_the_optimizer_at_the_rate_of_the_round(spec):
    """In the third round; what the optimizer keeps is made anew."""
    rate = {"learning_rate": 0.04, "schedule": "exponential:gamma=0.5", "momentum": 0.8, "weight_decay": 0.1}
    experiment = prepare(tiny(algorithm="fedavg", optimizer=spec, **rate, **TRAINED))
    trainer, client = experiment.setup.trainer, experiment.client(1, 3, {})
    start = trainer.initial_weights(client.model)
    weights, wanted = trainer.train(client, start), descended(experiment, client, OPTIMIZERS[spec])
    for name, tensor in wanted.items():
        assert torch.allclose(weights[name], tensor, atol=2e-5), name
    assert all(torch.equal(trainer.train(client, start)[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "./mine.py:Lion"}, "Unknown optimizer"),
        ({"optimizer": "adam:nesterov=true"}, "nesterov"),
        ({"optimizer": "sgd:nesterov=true", "momentum": 0}, "needs a --momentum above 0"),
        ({"optimizer": "adam", "algorithm": "scaffold"}, "scaffold assumes that clients train with SGD"),
        ({"schedule": "linear"}, "Unknown schedule"),
        ({"schedule": "step"}, "milestones"),
        ({"schedule": "step:milestones=0"}, "milestones=0 is not usable"),
        ({"schedule": "exponential:gamma=2"}, "gamma=2 is not usable"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_round(options, message):
    with pytest.raises(UsageError, match=message):
        check(tiny(**options))
