"""Training and distillation of one model, step by step, against the same steps written out with PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms.base import Update
from fedkd.algorithms.ensemble import distill_locally
from fedkd.core import seeds, specs, tensors
from fedkd.core.soft_labels import SoftLabels
from fedkd.core.tensors import equal, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models, optimizers
from fedkd.training.losses.logits import cross_entropy
from fedkd.training.terms import Features, Logits
from fedkd.training.terms.objective import DistillationObjective
from tests.conftest import tiny

T = 4.0
#: One batch holds everything, and nothing but the gradient moves the weights.
ONE_STEP = {
    "clients": 12,
    "batch_size": 4096,
    "distill_batch_size": 4096,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "augment": False,
}


class Net(nn.Module):
    """A network whose training mode differs from its evaluation mode in two ways."""

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.pool, self.first = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 16)
        self.norm, self.drop, self.last = nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(self.pool(x).flatten(1))).relu()))


NET = f"{__name__}:Net"


def module_of(setup, model, weights):
    """A new module with these weights, in training mode."""
    module = models.build(model, setup.classes, setup.config.norm)
    module.load_state_dict(dict(weights))
    return module.train()


def logits_of(setup, model, weights, pixels):
    with torch.no_grad():
        return module_of(setup, model, weights).eval()(setup.trainer.scaling(pixels))


def step(setup, model, weights, optimizer, loss_of):
    """The weights after one step along the gradient of ``loss_of(module)``."""
    module = module_of(setup, model, weights)
    made = optimizer(module.parameters())
    loss_of(module).backward()
    made.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_close(ours, expected, start, atol=2e-6):
    """Close to each other, and both well away from the start."""
    assert set(ours) == set(expected)
    assert max((expected[n] - start[n]).abs().max().item() for n in start) > 100 * atol
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, atol=atol), name


def soft_labels(count, seed=0, scale=2.0):
    return scale * torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))


def soft_kl(logits, probs):
    return F.kl_div(logits.log_softmax(-1), probs, reduction="batchmean")


def batches_of(count, size, epochs, seed):
    """The rows of each batch of some epochs, epoch by epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield [order[first : first + size] for first in range(0, count, size)]


@pytest.fixture(params=["adam", "sgd"])
def optimizer(request, monkeypatch):
    """Distillation by Adam as it is, which does not see the size of a gradient, and by plain SGD, which does."""
    if request.param == "sgd":
        monkeypatch.setattr(optimizers, "adam", lambda parameters, *_: optimizers.sgd(parameters, 0.0, 0.0))
        return torch.optim.SGD, 0.05
    return torch.optim.Adam, 0.002


# -- distillation at a temperature --------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_distillation_loss_at_a_temperature(loss):
    warm, plain = (prepare(tiny(temperature=temperature, loss=loss)).setup.distillation for temperature in (T, 1.0))
    logits, probs = soft_labels(7), soft_labels(7, 1).softmax(-1)
    if loss == "kl":
        expected = 16 * soft_kl(logits / 4, probs), soft_kl(logits, probs)
    else:
        expected = [t**2 * ((logits / t).softmax(-1) - probs).square().sum(-1).mean() for t in (4, 1)]
    assert warm.objective(logits, probs).item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert plain.objective(logits, probs).item() == pytest.approx(expected[1].item(), rel=1e-5)


@pytest.mark.parametrize("aggregator", ["mean-probs", "mean-logits"])
def test_the_ensemble_divides_logits_by_the_temperature_once(aggregator):
    setup = prepare(tiny(temperature=T, aggregator=aggregator)).setup
    logits, weights = soft_labels(3 * 5, scale=6.0).view(3, 5, 10), torch.tensor([[1.0], [2.0], [5.0]])
    shares = weights[..., None] / 8
    expected = {
        "mean-probs": (shares * (logits / 4).softmax(-1)).sum(0),
        "mean-logits": (shares * logits / 4).sum(0).softmax(-1),
    }[aggregator]
    assert torch.allclose(setup.distillation.teacher_probs(list(logits), weights), expected, atol=1e-6)


def test_client_weights_are_uniform_or_numbers_of_examples():
    uniform, by_size = (prepare(tiny(weighting=weighting)).setup.distillation for weighting in ("uniform", "size"))
    assert uniform.client_weights([3, 8]).tolist() == [[1.0], [1.0]]
    assert by_size.client_weights([3, 8]).tolist() == [[3.0], [8.0]]


@pytest.mark.parametrize(("aggregator", "weighting"), [("mean-probs", "size"), ("mean-logits", "uniform")])
def test_one_step_of_server_distillation_at_a_temperature(optimizer, aggregator, weighting):
    kind, rate = optimizer
    config = tiny(**ONE_STEP, temperature=T, aggregator=aggregator, weighting=weighting, distill_learning_rate=rate)
    experiment = prepare(config)
    setup, algorithm = experiment.setup, experiment.algorithm
    logits = soft_labels(3 * 40, scale=5.0).view(3, 40, 10)
    updates = {k: Update({"logits": values}, 10 * (k + 1)) for k, values in enumerate(logits)}
    state = algorithm.initial_state(setup)
    new = algorithm.aggregate(setup, state, updates, seed=1)

    shares = (torch.tensor([1.0, 2.0, 3.0]) / 6 if weighting == "size" else torch.ones(3) / 3).view(3, 1, 1)
    if aggregator == "mean-probs":
        probs = (shares * (logits / 4).softmax(-1)).sum(0)
    else:
        probs = (shares * logits / 4).sum(0).softmax(-1)
    assert torch.allclose(new["probs"], probs, atol=1e-6)
    assert torch.allclose(algorithm.teacher_probs(setup, list(logits), 6 * shares[..., 0]), probs, atol=1e-6)
    start, images = take("student", state), setup.trainer.scaling(setup.proxy.images)
    expected = step(
        setup,
        setup.student,
        start,
        lambda parameters: kind(parameters, rate),
        lambda module: 16 * soft_kl(module(images) / 4, probs),
    )
    assert_close(algorithm.global_model(setup, new), expected, start)
    assert (int(new["round"]), int(new["prev"])) == (2, 1)


@pytest.mark.parametrize("name", ["ensemble:downlink=labels", "kt-pfl"])
def test_one_step_of_client_distillation_at_a_temperature(optimizer, name):
    """A client distills from the soft labels, trains on its samples, and uploads its outputs on the proxy samples."""
    kind, rate = optimizer
    experiment = prepare(tiny(**ONE_STEP, algorithm=name, temperature=T, distill_learning_rate=rate))
    setup, algorithm = experiment.setup, experiment.algorithm
    start = {n: w + 0.01 for n, w in setup.trainer.initial_weights(setup.student).items()}
    client, probs = experiment.client(1, 2, tensors.put("model", start)), soft_labels(40).softmax(-1)
    request = {"round": torch.tensor(2), "prev": torch.tensor(1), "probs": probs}
    update, memory = algorithm.local_update(setup, client, request)

    model, images = setup.student, setup.trainer.scaling(setup.proxy.images)
    distilled = step(
        setup,
        model,
        start,
        lambda parameters: kind(parameters, rate),
        lambda module: 16 * soft_kl(module(images) / 4, probs),
    )
    ours = distill_locally(setup, client, start, setup.proxy.subset(1), probs, setup.distillation.objective, 1)
    assert_close(ours, distilled, start)
    own = setup.trainer.scaling(client.data.pixels)
    trained = step(
        setup,
        model,
        distilled,
        lambda parameters: torch.optim.SGD(parameters, setup.config.learning_rate),
        lambda module: F.cross_entropy(module(own), client.data.labels),
    )
    assert_close(take("model", memory), trained, distilled, atol=1e-5)
    logits = logits_of(setup, model, take("model", memory), setup.proxy.images)
    if name == "kt-pfl":
        assert torch.allclose(update.tensors["probs"], (logits / 4).softmax(-1), atol=1e-5)
    else:
        assert torch.allclose(update.tensors["logits"], logits, atol=1e-4)
    assert update.examples == len(client.data)


def test_one_step_of_a_ds_fl_client_has_no_temperature(optimizer):
    """The soft cross-entropy at temperature 1, though the run's is 4 and its loss another."""
    kind, rate = optimizer
    config = tiny(
        **ONE_STEP, algorithm="dsfl:local_distill_epochs=1", temperature=T, loss="mse", distill_learning_rate=rate
    )
    experiment = prepare(config)
    setup, algorithm = experiment.setup, experiment.algorithm
    start, images = setup.trainer.initial_weights(setup.student), setup.trainer.scaling(setup.proxy.images)
    client, probs = experiment.client(1, 2, {}), soft_labels(40).softmax(-1)
    request = {"round": torch.tensor(2), "prev": torch.tensor(1), "probs": probs}
    distilled = step(
        setup,
        setup.student,
        start,
        lambda parameters: kind(parameters, rate),
        lambda module: F.cross_entropy(module(images), probs),
    )
    own = algorithm.distill_client(setup, client, start, request)
    assert_close(own, distilled, start)
    update, memory = algorithm.local_update(setup, client, request)
    assert equal(take("model", memory), setup.trainer.train(client, own))
    logits = logits_of(setup, setup.student, take("model", memory), setup.proxy.images)
    assert torch.allclose(update.tensors["probs"], logits.softmax(-1), atol=1e-5)


# -- the loops ----------------------------------------------------------------------------------


def test_local_training_is_sgd_with_the_options_of_the_run():
    """Two epochs with a smaller last batch, momentum and weight decay."""
    experiment = prepare(
        tiny(
            clients=12, local_epochs=2, batch_size=50, learning_rate=0.02, momentum=0.8, weight_decay=0.1, augment=False
        )
    )
    setup, client = experiment.setup, experiment.client(2, 3, {})
    start = setup.trainer.initial_weights(setup.student)
    module = module_of(setup, setup.student, start)
    sgd = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.8, weight_decay=0.1)
    assert len(client.data) % 50
    for epoch in batches_of(len(client.data), 50, 2, seeds.derive(client.seed, "fit")):
        for rows in epoch:
            sgd.zero_grad()
            F.cross_entropy(
                module(setup.trainer.scaling(client.data.pixels[rows])), client.data.labels[rows]
            ).backward()
            sgd.step()
    assert_close(setup.trainer.train(client, start), module.state_dict(), start, atol=1e-5)


def test_distillation_is_adam_with_the_options_of_the_run():
    setup = prepare(tiny(temperature=T, distill_batch_size=15, distill_learning_rate=0.0005)).setup
    start, rows, probs = setup.trainer.initial_weights(setup.student), torch.arange(1, 39), soft_labels(38).softmax(-1)
    module = module_of(setup, setup.student, start)
    adam = torch.optim.Adam(module.parameters(), 0.0005)
    for epoch in batches_of(38, 15, 2, 77):
        for batch in epoch:
            adam.zero_grad()
            (16 * soft_kl(module(setup.trainer.scaling(setup.proxy.images[rows][batch])) / 4, probs[batch])).backward()
            adam.step()
    labels, objective = SoftLabels(setup.proxy.images[rows], probs), setup.distillation.objective
    ours = setup.trainer.distill(setup.student, start, labels, objective, epochs=2, seed=77)
    assert_close(ours, module.state_dict(), start, atol=1e-5)


@pytest.mark.parametrize("augment", [True, False])
def test_each_use_of_training_has_its_own_seed_and_augmentation(monkeypatch, augment):
    """Only the client's samples are cropped."""
    seen = []
    monkeypatch.setattr(loop, "train", lambda *_, **options: seen.append(options))
    experiment = prepare(
        tiny(algorithm="ensemble:downlink=labels,local_distill_epochs=3", augment=augment, local_epochs=2)
    )
    trainer = dataclasses.replace(experiment.setup.trainer, flip=True)
    setup, algorithm = dataclasses.replace(experiment.setup, trainer=trainer), experiment.algorithm
    client = experiment.client(1, 2, {})
    probs = soft_labels(40).softmax(-1)
    algorithm.local_update(setup, client, {"round": torch.tensor(2), "prev": torch.tensor(1), "probs": probs})
    setup.trainer.train(client, setup.local_weights(client), soft_labels=SoftLabels(setup.proxy.images[:5], probs[:5]))
    algorithm.distill_student(setup, algorithm.initial_state(setup), torch.arange(40), probs, 5)
    distilled, trained, jointly, server = seen
    assert distilled["seed"] == seeds.derive(client.seed, "digest")
    assert trained["seed"] == jointly["seed"] == seeds.derive(client.seed, "fit")
    assert server["seed"] == 5
    assert [call["epochs"] for call in seen] == [3, 2, 2, setup.config.distill_epochs]
    assert distilled["augmentation"] == server["augmentation"] == loop.Augmentation()
    assert trained["augmentation"] == loop.Augmentation(augment, True)
    assert jointly["augmentation"] == loop.Augmentation(augment, True, len(client.data))
    assert not any(call.get("average") for call in seen)


# -- weight averaging ---------------------------------------------------------------------------


def small():
    with seeds.seeded(3):
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10))


def descended(pixels, labels, **options):
    model = small()
    held = {"scaling": loop.Scaling.of(pixels), "batch_size": 16, "seed": 7, **options}
    held |= {"augmentation": loop.Augmentation(), "rates": [0.1]}
    loop.train(
        model,
        optimizers.sgd(list(model.parameters()), 0.9, 0.0),
        pixels,
        labels,
        F.cross_entropy,
        held.pop("scaling"),
        **held,
    )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_averaged_weights_of_so_many_steps_are_those_of_the_epochs_that_this_takes(generator):
    """Of four batches: six steps are an epoch and a half."""
    pixels = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (50,), generator=generator)
    after = [descended(pixels, labels, epochs=1, steps=steps) for steps in (4, 6)]
    ours = descended(pixels, labels, epochs=1, steps=6, average=True)
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, (after[0][name] + after[1][name]) / 2, atol=1e-6), name


@pytest.mark.parametrize("epochs", [1, 3])
def test_averaged_weights_are_the_mean_of_those_after_each_epoch(generator, epochs):
    """A run of k epochs begins as one of more does; buffers are averaged as well, but for the counter."""
    pixels = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (50,), generator=generator)
    after = [descended(pixels, labels, epochs=k) for k in range(1, epochs + 1)]
    ours = descended(pixels, labels, epochs=epochs, average=True)
    for name, tensor in ours.items():
        expected = torch.stack([weights[name].double() for weights in after]).mean(0)
        if name.endswith("num_batches_tracked"):
            expected = after[-1][name]
        assert torch.allclose(tensor.double(), expected.double(), atol=1e-6), name
    if epochs > 1:
        assert not any(torch.allclose(ours["2.weight"], weights["2.weight"], atol=1e-3) for weights in after)


def test_the_average_over_no_epoch_is_the_start(generator):
    pixels = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)
    ours = descended(pixels, torch.zeros(20, dtype=torch.int64), epochs=0, average=True)
    assert equal(ours, {name: tensor.clone() for name, tensor in small().state_dict().items()})


def test_fedbe_averages_its_student_over_epochs_and_feddf_does_not():
    experiment = prepare(tiny(algorithm="fedbe:samples=1", distill_epochs=3, distill_learning_rate=0.01))
    setup = experiment.setup
    updates = {
        k: Update({n: w + 0.02 * (k + 1) for n, w in setup.trainer.initial_weights(setup.student).items()}, 1 + k)
        for k in range(2)
    }
    logits = torch.stack(
        [setup.trainer.predict(setup.student, u.tensors, setup.proxy.images) for u in updates.values()]
    )
    mean = tensors.weighted_mean([u.tensors for u in updates.values()], [1, 2])
    for name, is_averaged in (("fedbe:samples=1", True), ("feddf", False)):
        algorithm = specs.call("algorithm", name)
        targets = algorithm.server_step.targets(setup, updates, logits, setup.proxy.images, 9)
        ours = algorithm.global_model(
            setup, algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=9)
        )
        labels, seed = SoftLabels(setup.proxy.images, targets), seeds.derive(9, "group0")
        after = [
            setup.trainer.distill(setup.student, mean, labels, cross_entropy, epochs=epochs, seed=seed)
            for epochs in (1, 2, 3)
        ]
        expected = tensors.weighted_mean(after, [1, 1, 1]) if is_averaged else after[-1]
        assert_close(ours, expected, mean, atol=1e-6)


# -- a teacher beside a client ------------------------------------------------------------------


def with_teacher(setup, client, start, model, teacher, term):
    """One step beside a teacher in evaluation mode: (1 - 0.9) CE + 0.9 T^2 KL."""
    images = setup.trainer.scaling(client.data.pixels)
    probs = (logits_of(setup, model, teacher, client.data.pixels) / term.temperature).softmax(-1)

    def loss_of(module):
        logits = module(images)
        soft = term.temperature**2 * soft_kl(logits / term.temperature, probs)
        return 0.1 * F.cross_entropy(logits, client.data.labels) + 0.9 * soft

    def sgd(parameters):
        return torch.optim.SGD(parameters, setup.config.learning_rate)

    return step(setup, setup.student, start, sgd, loss_of)


@pytest.mark.parametrize("model", ["cnn:width=8", "cnn:width=4", NET])
def test_a_mentor_teaches_in_evaluation_mode(model):
    """By its running statistics and without dropout; also one that has the student's architecture."""
    experiment = prepare(tiny(**ONE_STEP, norm="batch"))
    setup, client = experiment.setup, experiment.client(0, 1, {})
    start = setup.trainer.initial_weights(setup.student)
    mentor = setup.trainer.train(dataclasses.replace(client, model=model), setup.trainer.initial_weights(model))
    before = {name: tensor.clone() for name, tensor in mentor.items()}
    ours, adapters = setup.trainer.train_with_teacher(client, start, (model, mentor), Logits(), {})
    assert adapters == {}
    assert_close(ours, with_teacher(setup, client, start, model, mentor, Logits()), start, atol=1e-5)
    assert equal(mentor, before)


@pytest.mark.parametrize("term", ["logits", "features", "contrastive"])
def test_a_mentor_is_frozen_while_it_teaches(monkeypatch, term):
    """No gradients, and no step nor batch statistics change it: neither the module, nor what is remembered."""
    experiment, seen = prepare(tiny(clients=12, norm="batch")), []
    setup, client = experiment.setup, experiment.client(0, 1, {})
    original = loop.train

    def watched(module, *arguments, **options):
        teachers = [teacher.model for teacher in module.teachers] if isinstance(module, DistillationObjective) else []
        before = [{name: tensor.clone() for name, tensor in t.state_dict().items()} for t in teachers]
        original(module, *arguments, **options)
        for teacher, held in zip(teachers, before, strict=True):
            seen.append(held)
            assert equal({name: tensor.clone() for name, tensor in teacher.state_dict().items()}, held)
            assert not any(part.training for part in teacher.modules())
            for parameter in teacher.parameters():
                assert not parameter.requires_grad
                assert parameter.grad is None
            assert not {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}

    monkeypatch.setattr(loop, "train", watched)
    algorithm = specs.call("algorithm", f"mentor:model=cnn:width=4,term={term}")
    _, memory = algorithm.local_update(setup, client, setup.trainer.initial_weights(setup.student))
    mentor = take("mentor", memory)
    assert len(seen) == 1
    assert equal(seen[0], mentor)
    own = dataclasses.replace(client, model="cnn:width=4")
    assert equal(mentor, setup.trainer.train(own, setup.trainer.initial_weights("cnn:width=4")))
    again = algorithm.local_update(
        setup, experiment.client(0, 2, memory), setup.trainer.initial_weights(setup.student)
    )[1]
    later = dataclasses.replace(experiment.client(0, 2, {}), model="cnn:width=4")
    assert equal(take("mentor", again), setup.trainer.train(later, mentor))


def test_adapters_start_from_their_own_seed_or_from_the_memory():
    experiment = prepare(tiny(clients=12, learning_rate=1e-12))
    setup, client = experiment.setup, experiment.client(0, 2, {})
    start, teacher = (
        setup.trainer.initial_weights(setup.student),
        ("cnn:width=4", setup.trainer.initial_weights("cnn:width=4")),
    )
    with seeds.seeded(seeds.derive(client.seed, "adapters")):
        expected = nn.Conv2d(16, 8, 1)
    _, fresh = setup.trainer.train_with_teacher(client, start, teacher, Features(), {})
    assert {tuple(tensor.shape) for tensor in fresh.values()} == {(8, 16, 1, 1), (8,)}
    for tensor in fresh.values():
        assert torch.allclose(tensor, expected.weight if tensor.dim() == 4 else expected.bias, atol=1e-7)
    held = {name: tensor + 1 for name, tensor in fresh.items()}
    _, kept = setup.trainer.train_with_teacher(client, start, teacher, Features(), held)
    assert all(torch.allclose(kept[name], tensor, atol=1e-5) for name, tensor in held.items())
