"""MOON, FedNTD, FedLMD and FedVLS, whose clients train beside frozen models, against their papers' formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fedkd.algorithms.fedntd import FedLMD, FedNTD
from fedkd.algorithms.fedvls import FedVLS
from fedkd.algorithms.moon import Moon
from fedkd.core import specs
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models, together
from fedkd.training.requests import Fit
from tests.algorithms.test_methods import one_round
from tests.conftest import tiny


def slowly_trained(setup, client, start, frozen, loss_of):
    """Weights after SGD written out, beside frozen models in evaluation mode that see the same augmented images."""

    def built(weights):
        module = models.build(setup.student, setup.classes, setup.config.norm).to(memory_format=torch.channels_last)
        module.load_state_dict(weights)
        return module

    seen = {}

    def outputs_of(module, x):
        with torch.set_grad_enabled(module.training):
            return module(x), seen.pop(id(module))

    student, others = built(start).train(), [built(weights).eval() for weights in frozen]
    for module in (student, *others):
        last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, inputs, module=module: seen.update({id(module): inputs[0]}))
    config, generator = setup.config, torch.Generator().manual_seed(client.derive("fit"))
    sgd = torch.optim.SGD(student.parameters(), config.learning_rate, config.momentum, 0, config.weight_decay)
    sizes = loop.batch_sizes(student, len(client.data), config.batch_size)
    for _ in range(config.local_epochs):
        for rows in loop.batches(sizes, generator):
            augmentation = loop.Augmentation(config.augment, setup.trainer.flip)
            x = setup.trainer.scaling(augmentation(client.data.pixels[rows], rows, generator))
            ours, theirs = outputs_of(student, x), [outputs_of(other, x) for other in others]
            sgd.zero_grad()
            loss_of(ours, theirs, client.data.labels[rows]).backward()
            sgd.step()
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def moons_loss(mu, temperature):
    """CE - mu log(e^(sim(z, z_glob) / t) / (e^(sim(z, z_glob) / t) + e^(sim(z, z_prev) / t))), sample by sample."""

    def loss_of(ours, theirs, labels):
        losses = []
        for k, label in enumerate(labels):
            z, (near, far) = ours[1][k], [other[1][k] for other in theirs]
            s_near, s_far = (z @ v / z.norm() / v.norm() for v in (near, far))
            ratio = (s_near / temperature).exp() / ((s_near / temperature).exp() + (s_far / temperature).exp())
            losses.append(-ours[0][k].log_softmax(0)[label] - mu * ratio.log())
        return torch.stack(losses).mean()

    return loss_of


def not_true_loss(beta, temperature, masked=()):
    """CE + beta T^2 KL(global || local) over the classes but the true one; the teacher's also without ``masked``."""

    def loss_of(ours, theirs, labels):
        losses = []
        for logits, teacher, label in zip(ours[0], theirs[0][0], labels.tolist(), strict=True):
            kept = [c for c in range(len(logits)) if c != label]
            taught = [c for c in kept if c not in masked]
            distance = logits.sum() * 0
            if taught:
                p = (teacher[taught] / temperature).softmax(0)
                q = (logits[kept] / temperature).softmax(0)
                distance = sum(p[k] * (p[k] / q[kept.index(c)]).log() for k, c in enumerate(taught))
            losses.append(-logits.log_softmax(0)[label] + beta * temperature**2 * distance)
        return torch.stack(losses).mean()

    return loss_of


def vacant_class_loss(weight, suppression, counts):
    """The authors' calibrated cross-entropy, KL over the classes without samples, and suppression, number by number."""
    classes, shares = range(len(counts)), [count / sum(counts) for count in counts]
    absent = [c for c in classes if not counts[c]]

    def loss_of(ours, theirs, labels):
        fits, distances = [], []
        for logits, teacher, label in zip(ours[0], theirs[0][0], labels.tolist(), strict=True):
            shifted = [(logits[c] + math.log(shares[c] + 1e-9)).exp() for c in classes]
            fits.append(-(shifted[label] / sum(shifted)).log())
            p, q = teacher[absent].softmax(0), logits[absent].softmax(0)
            distances.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))
        suppressed = 0
        for c in classes:
            if shares[c]:
                values = [
                    row[c].exp() / (shares[c] + 1e-9) / len(counts) if label != c else torch.tensor(1.0)
                    for row, label in zip(ours[0], labels.tolist(), strict=True)
                ]
                suppressed = suppressed + shares[c] * (sum(values) / len(values)).log()
        return sum(fits) / len(fits) + weight * sum(distances) / len(fits) + suppression * suppressed

    return loss_of


SLOW = {"clients": 12, "local_epochs": 2, "norm": "batch", "augment": "true", "partitioner": "dirichlet:alpha=0.3"}


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("moon", "moon:mu=1,temperature=0.2", "fedntd", "fedntd:beta=0.5,temperature=2", "fedlmd"),
        *("fedvls", "fedvls:weight=2,suppression=0.3"),
    ],
)
def test_local_training_is_the_papers(name, is_together, monkeypatch):
    """In a client's second round, with augmented images and BatchNorm; on its own and in a stack."""
    monkeypatch.setattr(together, "pays", lambda _: is_together)
    experiment = prepare(tiny(algorithm=name, **SLOW))
    algorithm, setup, clients = experiment.algorithm, experiment.setup, (2, 5)
    first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {}, clients)
    updates, _, _ = one_round(experiment, algorithm, 2, first[2], first[1], clients)
    for number in clients:
        client = experiment.client(number, 2, first[1][number])
        if isinstance(algorithm, Moon):
            frozen, loss_of = [first[2], first[0][number].tensors], moons_loss(algorithm.mu, algorithm.temperature)
        elif isinstance(algorithm, FedVLS):
            counts = torch.bincount(client.data.labels, minlength=10).tolist()
            assert 0 in counts
            frozen, loss_of = [first[2]], vacant_class_loss(algorithm.weight, algorithm.suppression, counts)
        else:
            counts = torch.bincount(client.data.labels, minlength=10).tolist()
            major = [c for c in range(10) if counts[c] > sum(counts) / 10] if name == "fedlmd" else []
            frozen, loss_of = [first[2]], not_true_loss(algorithm.beta, algorithm.temperature, major)
            assert bool(major) == (name == "fedlmd")
        expected = slowly_trained(setup, client, first[2], frozen, loss_of)
        moved = max((expected[n].float() - first[2][n].float()).abs().max() for n in expected)
        for key, tensor in updates[number].tensors.items():
            assert torch.allclose(tensor.float(), expected[key].float(), atol=2e-3 * float(moved), rtol=1e-3), key


def test_moons_term_of_known_vectors():
    """-log(e^2 / (e^2 + e^0)) where the embedding is that of the global model and orthogonal to that of the last."""
    at, across = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    logits, label = torch.zeros(1, 2), torch.tensor([0])
    loss = Moon(mu=1).objective(((logits, at), [(logits, 5 * at), (logits, across)]), label)
    assert float(loss) == pytest.approx(math.log(2) + 0.1269280110, abs=1e-6)
    away = Moon(mu=5).objective(((logits, at), [(logits, across), (logits, -at)]), label)
    assert float(away) == pytest.approx(math.log(2) + 5 * 0.1269280110, abs=1e-6)


def test_the_not_true_distance_of_known_logits():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) - 1/4 ln 2, whatever the logits of the true class are."""
    labels, teacher = torch.tensor([0]), torch.tensor([[9.0, math.log(3), 0.0]])
    none = {"masked": torch.zeros(3, dtype=torch.bool)}
    distance = 0.1308120359
    for beta, temperature in ((1, 1), (0.3, 1), (2, 4)):
        loss = FedNTD(beta, temperature).objective((torch.tensor([[0.0, 1, 1]]), [temperature * teacher]), labels, none)
        expected = math.log(1 + 2 * math.e) + beta * temperature**2 * distance
        assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_fedlmd_masks_the_classes_above_the_mean_in_the_teacher_only():
    algorithm = FedLMD()
    assert algorithm.masked(torch.tensor([8, 0, 3, 1])).tolist() == [True, False, False, False]
    assert not algorithm.masked(torch.tensor([3, 3, 3])).any()
    logits = torch.zeros(1, 4)
    masked = {"masked": torch.tensor([True, False, False, False])}
    # The teacher's classes are 2 and 3, the student's 0, 2 and 3: KL((1/2, 1/2) || (1/3, 1/3)) = ln(3/2).
    loss = algorithm.objective((logits, [logits]), torch.tensor([1]), masked)
    assert float(loss) == pytest.approx(math.log(4) + math.log(1.5), abs=1e-6)


def test_the_three_terms_of_fedvls_of_known_logits():
    """Three of four samples are of class 0, none of class 2 or 3; a batch of one sample of class 0 and one of class 1.

    The calibrated fit of logits zero is -ln p. On classes 2 and 3, KL((3/4, 1/4) || (1/2, 1/2)) = 0.1308. The mean for
    class 0 is (1 + 1 / (4 * 3/4)) / 2 = 2/3, for class 1 (1 / (4 * 1/4) + 1) / 2 = 1.
    """
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    teacher, shares = torch.tensor([[9.0, -9, math.log(3), 0]]).expand(2, 4), torch.tensor([0.75, 0.25, 0, 0])
    fit, vacant, suppressed = -(math.log(3 / 4) + math.log(1 / 4)) / 2, 0.1308120359, 3 / 4 * math.log(2 / 3)
    for weight, suppression in ((0, 0), (1, 0), (0, 1), (0.1, 0.005)):
        loss = FedVLS(weight, suppression).objective((logits, [teacher]), labels, {"shares": shares})
        assert float(loss) == pytest.approx(fit + weight * vacant + suppression * suppressed, abs=1e-6)


def test_fedvls_with_samples_of_all_classes_distills_nothing():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 0])
    shares = {"shares": torch.full((3,), 1 / 3)}
    loss = FedVLS(weight=9, suppression=0).objective((logits, [2 * logits]), labels, shares)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-6)


def test_without_a_class_to_distill_only_the_cross_entropy_is_left():
    """Of two classes, the true one and a masked one."""
    logits = torch.tensor([[0.3, -2.0]], requires_grad=True)
    loss = FedLMD().objective(
        (logits, [logits.detach() + 1]), torch.tensor([1]), {"masked": torch.tensor([True, False])}
    )
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([1])))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, logits.detach().softmax(1) - torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("name", ["moon:mu=0", "moon", "fedntd:beta=0", "fedlmd:beta=0"])
def test_without_a_term_they_are_fedavg(name):
    """Bitwise; MOON in a client's first round up to rounding, as the model to keep away from is the global one."""
    experiment = prepare(tiny(clients=12))
    setup, client = experiment.setup, experiment.client(0, 1, {})
    start = setup.trainer.initial_weights(setup.student)
    ours, plain = (
        specs.call("algorithm", each).local_update(setup, client, start)[0].tensors for each in (name, "fedavg")
    )
    if name == "moon":
        assert all(torch.allclose(ours[key], tensor, atol=1e-6) for key, tensor in plain.items())
    else:
        assert equal(ours, plain)


def test_frozen_models_do_not_change_and_are_no_parameters(monkeypatch):
    experiment, original, seen = prepare(tiny(clients=12, norm="batch")), Fit._teachers, []
    setup, client = experiment.setup, experiment.client(0, 1, {})
    monkeypatch.setattr(Fit, "_teachers", lambda fit: seen.append(original(fit)) or seen[-1])
    start = setup.trainer.initial_weights(setup.student)
    _, memory = Moon().local_update(setup, client, start)
    Moon().local_update(setup, dataclasses.replace(client, memory=memory), start)
    for (near, far), last in zip(seen, (start, {n.removeprefix("model/"): t for n, t in memory.items()}), strict=True):
        assert equal(dict(near.state_dict()), start)
        assert equal(dict(far.state_dict()), last)
        for module in (near, far):
            assert not any(part.training for part in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())


def test_moon_needs_an_embedding(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\ndef flat(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    experiment = prepare(tiny(model=f"{tmp_path}/own.py:flat"))
    with pytest.raises(UsageError, match=r"moon cannot use --model .*no linear layer"):
        Moon().initial_state(experiment.setup)
