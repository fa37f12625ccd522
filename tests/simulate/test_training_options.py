"""Options of training, from the command line to the weights, against loops with PyTorch's own classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedkd.core import seeds
from fedkd.core.errors import UsageError
from fedkd.simulate.checks import check
from fedkd.simulate.experiment import prepare
from fedkd.training import models
from tests.conftest import tiny

TRAINED = {"clients": 12, "batch_size": 50, "local_epochs": 2, "augment": False, "rounds": 8}


def module_of(setup, weights):
    module = models.build(setup.student, setup.classes, setup.config.norm)
    module.load_state_dict(weights)
    return module.to(memory_format=torch.channels_last).train()


def descended(experiment, client, optimizer, epochs=2, steps=None, clip=None, smoothing=0.0):
    """The weights after local training by an optimizer of torch.optim, for so many steps."""
    setup = experiment.setup
    module = module_of(setup, setup.trainer.initial_weights(setup.student))
    generator = torch.Generator().manual_seed(seeds.derive(client.seed, "fit"))
    optimizer = optimizer(module.parameters())
    orders = [torch.randperm(len(client.data), generator=generator) for _ in range(epochs)]
    for rows in [rows for order in orders for rows in order.split(50)][:steps]:
        optimizer.zero_grad()
        logits = module(setup.trainer.scaling(client.data.pixels[rows]))
        torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, client.data.labels[rows]).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
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


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_clients_train_for_so_many_steps(steps):
    """Of three batches each, the last of which is smaller; in an order that is drawn anew when an epoch ends."""
    experiment = prepare(tiny(algorithm="fedavg", **TRAINED | {"local_steps": steps, "weight_decay": 0}))
    trainer, client = experiment.setup.trainer, experiment.client(1, 3, {})
    assert 100 < len(client.data) < 150
    assert trainer.steps(client) == steps
    weights = trainer.train(client, trainer.initial_weights(client.model))
    wanted = descended(experiment, client, lambda p: torch.optim.SGD(p, 0.01, 0.9), epochs=3, steps=steps)
    for name, tensor in wanted.items():
        assert torch.allclose(weights[name], tensor, atol=2e-5), name


@pytest.mark.parametrize(("clip_norm", "changes"), [(0.5, True), (100.0, False)])
def test_gradients_are_clipped_as_by_torch(clip_norm, changes):
    experiment = prepare(tiny(algorithm="fedavg", **TRAINED | {"clip_norm": clip_norm, "weight_decay": 0.1}))
    trainer, client = experiment.setup.trainer, experiment.client(1, 3, {})
    weights = trainer.train(client, trainer.initial_weights(client.model))
    wanted, without = (
        descended(experiment, client, lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=0.1), clip=clip)
        for clip in (clip_norm, None)
    )
    assert all(torch.allclose(weights[name], tensor, atol=2e-5) for name, tensor in wanted.items())
    assert all(torch.equal(without[name], tensor) for name, tensor in wanted.items()) is not changes


def test_labels_are_smoothed_as_by_torch():
    experiment = prepare(tiny(algorithm="fedavg", **TRAINED | {"label_smoothing": 0.3, "weight_decay": 0}))
    trainer, client = experiment.setup.trainer, experiment.client(1, 3, {})
    weights = trainer.train(client, trainer.initial_weights(client.model))
    wanted, without = (
        descended(experiment, client, lambda p: torch.optim.SGD(p, 0.01, 0.9), smoothing=share) for share in (0.3, 0.0)
    )
    assert all(torch.allclose(weights[name], tensor, atol=2e-5) for name, tensor in wanted.items())
    assert not any(torch.allclose(without[name], tensor, atol=2e-5) for name, tensor in wanted.items())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("steps", "epochs"), [(0, 2), (5, 2)])
def test_the_server_distills_for_so_many_steps_by_a_schedule(schedule, steps, epochs):
    """40 proxy samples in batches of 16."""
    options = {"distill_epochs": epochs, "distill_steps": steps, "distill_schedule": schedule}
    experiment = prepare(tiny(distill_batch_size=16, distill_learning_rate=0.01, **options))
    setup, algorithm = experiment.setup, experiment.algorithm
    state, indices = algorithm.initial_state(setup), torch.arange(40)
    probs = torch.randn(40, setup.classes, generator=torch.Generator().manual_seed(1)).softmax(-1)
    new = algorithm.global_model(setup, algorithm.distill_student(setup, state, indices, probs, seed=5))
    module, total = module_of(setup, setup.trainer.initial_weights(setup.student)), steps or 3 * epochs
    optimizer, generator = torch.optim.Adam(module.parameters(), 0.01), torch.Generator().manual_seed(5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    orders = [torch.randperm(40, generator=generator) for _ in range(2)]
    for rows in [rows for order in orders for rows in order.split(16)][:total]:
        optimizer.zero_grad()
        logits = module(setup.trainer.scaling(setup.proxy.images[rows]))
        F.kl_div(logits.log_softmax(-1), probs[rows], reduction="batchmean").backward()
        optimizer.step()
        if schedule == "cosine":
            scheduler.step()
    for name, tensor in module.state_dict().items():
        assert torch.allclose(new[name], tensor, atol=1e-4), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "./mine.py:Lion"}, "Unknown optimizer"),
        ({"optimizer": "adam:nesterov=true"}, "nesterov"),
        ({"optimizer": "sgd:nesterov=true", "momentum": 0}, "needs a --momentum above 0"),
        ({"optimizer": "adam", "algorithm": "scaffold"}, "scaffold assumes that clients train with SGD"),
        ({"clip_norm": 1, "algorithm": "scaffold"}, "leave out --clip-norm 1"),
        ({"schedule": "linear"}, "Unknown schedule"),
        ({"schedule": "step"}, "milestones"),
        ({"schedule": "step:milestones=0"}, "milestones=0 is not usable"),
        ({"schedule": "exponential:gamma=2"}, "gamma=2 is not usable"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_round(options, message):
    with pytest.raises(UsageError, match=message):
        check(tiny(**options))
