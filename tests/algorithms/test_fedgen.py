"""FedGen: the generator and local training against their formulas, written out; and which models it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms.base import Update
from fedkd.core import specs
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal, put, take
from fedkd.simulate.experiment import prepare
from fedkd.training import embedding_generator, loop, models, together
from tests.algorithms.test_methods import one_round
from tests.conftest import tiny

CLASSES, WIDTH, NOISE = 4, 3, 32


def slow_loss(noise, z, labels, heads, counts):
    """The authors': weighted cross-entropies of the users' heads, and the diversity of all pairs in the batch."""
    size, total = len(labels), 0
    for (weight, bias), own in zip(heads, counts.tolist(), strict=True):
        for vector, label in zip(z, labels.tolist(), strict=True):
            logits = torch.stack([weight[c] @ vector + bias[c] for c in range(CLASSES)])
            share = own[label] / sum(each[label] for each in counts.tolist())
            total = total - share * logits.log_softmax(0)[label] / size
    pairs = [(a, b) for a in range(size) for b in range(size)]
    near = sum(-((noise[a] - noise[b]) ** 2).mean() * (z[a] - z[b]).abs().mean() for a, b in pairs)
    return total + (near / len(pairs)).exp()


def test_the_generator_is_trained_as_by_the_authors(generator):
    """Adam with their weight decay; labels that no client has are not drawn."""
    heads = [(torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES)) for _ in range(2)]
    counts = torch.tensor([[3, 0, 0, 1], [1, 0, 5, 1]])
    start = embedding_generator.initial_weights(CLASSES, WIDTH, seed=7)
    options = {"learning_rate": 0.01, "batch_size": 5, "steps": 4}
    ours = embedding_generator.trained(start, heads, counts, device="cpu", seed=11, **options)

    layers = nn.Sequential(nn.Linear(NOISE + CLASSES, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, WIDTH))
    layers.load_state_dict(take("layers", {name.replace(".", "/", 1): tensor for name, tensor in start.items()}))
    adam = torch.optim.Adam(layers.parameters(), 0.01, weight_decay=0.01)
    draws = torch.Generator().manual_seed(11)
    labels = torch.tensor([0, 2, 3])[torch.randint(3, (20,), generator=draws)]
    noise = torch.rand(20, NOISE, generator=draws)
    assert set(labels.tolist()) == {0, 2, 3}
    for rows in loop.batches([5] * 4, torch.Generator().manual_seed(11)):
        z = layers(torch.cat([noise[rows], F.one_hot(labels[rows], CLASSES)], 1))
        adam.zero_grad()
        slow_loss(noise[rows], z, labels[rows], heads, counts).backward()
        adam.step()
    for name, tensor in layers.state_dict().items():
        assert torch.allclose(ours[f"layers.{name}"].double(), tensor.double(), atol=1e-4), name
        assert name.startswith("1.") or not torch.equal(ours[f"layers.{name}"], start[f"layers.{name}"])


def test_the_loss_of_known_numbers():
    """Two heads, of which the first has all samples of class 0, and the second three quarters of those of class 1."""
    noise, z = torch.tensor([[0.0, 0], [1, 1]]), torch.tensor([[0.0], [2]])
    tensors = {
        "weights": torch.tensor([[[0.0], [0]], [[0.0], [1]]]),
        "biases": torch.tensor([[0.0, 0], [0, 0]]),
        "shares": torch.tensor([[1, 0.25], [0, 0.75]]),
    }
    # Class 0 costs ln 2; class 1 costs ln 2 by the first head, ln(1 + e^-2) by the second. Of four pairs, two are one
    # embedding, and two have noise 1 and embeddings 2 apart.
    fit = (math.log(2) + 0.25 * math.log(2) + 0.75 * math.log(1 + math.exp(-2))) / 2
    loss = embedding_generator.loss((noise, z), torch.tensor([0, 1]), tensors)
    assert float(loss) == pytest.approx(fit + math.exp(-(2 + 2) / 4), abs=1e-6)


def test_the_generator_learns_to_be_classified_by_the_heads(generator):
    heads = [(3 * torch.eye(CLASSES)[:, :WIDTH], torch.zeros(CLASSES)) for _ in range(3)]
    counts = torch.tensor([[5, 5, 5, 0]] * 3)
    start = embedding_generator.initial_weights(CLASSES, WIDTH, seed=7)
    options = {"learning_rate": 0.01, "batch_size": 32, "steps": 100, "device": "cpu", "seed": 1}
    weights = embedding_generator.trained(start, heads, counts, **options)
    accuracy = []
    for each in (start, weights):
        z, labels = embedding_generator.generated(each, counts.sum(0) > 0, 200, seed=3)
        assert labels.bincount(minlength=CLASSES)[3] == 0
        assert labels.bincount().min() > 40
        accuracy.append(loop.score(F.linear(z, *heads[0]), labels)[0])
    assert accuracy[0] < 0.8 < 0.95 < accuracy[1]


@pytest.mark.parametrize("is_together", [False, True])
def test_local_training_is_the_papers(is_together, monkeypatch):
    """CE + weight * CE of the head on generated embeddings, by SGD written out, in the second round."""
    monkeypatch.setattr(together, "pays", lambda _: is_together)
    options = {"clients": 12, "local_epochs": 2, "augment": "true", "learning_rate": 0.01}
    experiment = prepare(tiny(algorithm="fedgen:weight=3,server_steps=5", partitioner="dirichlet:alpha=0.3", **options))
    algorithm, setup, config = experiment.algorithm, experiment.setup, experiment.config
    first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {}, (2, 5))
    updates, _, _ = one_round(experiment, algorithm, 2, first[2], first[1], (2, 5))
    message = algorithm.broadcast(setup, first[2], 2)
    assert set(take("generator", message)) == set(take("generator", first[2]))
    known = torch.stack([update.tensors["counts"] for update in first[0].values()]).sum(0) > 0
    assert torch.equal(message["known"] > 0, known)
    for number in (2, 5):
        client = experiment.client(number, 2, first[1][number])
        z, labels = embedding_generator.generated(take("generator", message), known, 512, client.derive("generated"))
        module = models.build(setup.student, setup.classes, config.norm).to(memory_format=torch.channels_last)
        module.load_state_dict(take("student", message))
        head = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
        sgd = torch.optim.SGD(
            module.train().parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
        batches = torch.Generator().manual_seed(client.derive("fit"))
        for _ in range(config.local_epochs):
            for rows in loop.batches(loop.batch_sizes(module, len(client.data), config.batch_size), batches):
                augmentation = loop.Augmentation(config.augment, setup.trainer.flip)
                x = setup.trainer.scaling(augmentation(client.data.pixels[rows], rows, batches))
                sgd.zero_grad()
                fit = F.cross_entropy(module(x), client.data.labels[rows])
                (fit - 3 * head(z).log_softmax(1)[range(512), labels].mean()).backward()
                sgd.step()
        expected, start = module.state_dict(), take("student", message)
        moved = max(float((p.detach() - start[name]).abs().max()) for name, p in module.named_parameters())
        for name, tensor in expected.items():
            ours = updates[number].tensors[f"student/{name}"]
            assert torch.allclose(ours.float(), tensor.float(), atol=1e-3 * moved, rtol=0), name
        assert updates[number].tensors["counts"].tolist() == client.data.labels.bincount(minlength=10).tolist()


def test_it_is_fedavg_in_the_first_round_and_without_a_weight(experiment):
    setup, plain = experiment.setup, specs.call("algorithm", "fedavg")
    algorithm = specs.call("algorithm", "fedgen:server_steps=2")
    start = algorithm.initial_state(setup)
    assert set(algorithm.broadcast(setup, start, 0)) == set(put("student", take("student", start)))
    updates, memories, state = one_round(experiment, algorithm, 1, start, {})
    expected, _, student = one_round(experiment, plain, 1, plain.initial_state(setup), {})
    assert equal(take("student", updates[0].tensors), expected[0].tensors)
    assert equal(algorithm.global_model(setup, state), student)
    for weight, same in ((0, True), (1, False)):
        method = specs.call("algorithm", f"fedgen:weight={weight}")
        update, _ = method.local_update(setup, experiment.client(0, 2, memories[0]), state)
        other, _ = plain.local_update(setup, experiment.client(0, 2, {}), student)
        assert equal(take("student", update.tensors), other.tensors) is same


def test_counts_must_add_up():
    algorithm = specs.call("algorithm", "fedgen")
    assert algorithm.check_update(None, Update({"counts": torch.tensor([1, 2])}, 3)) == ""
    assert "add up" in algorithm.check_update(None, Update({"counts": torch.tensor([1, 2])}, 4))
    assert "add up" in algorithm.check_update(None, Update({"counts": torch.tensor([-1, 4])}, 3))


OWN = {
    "flat": "return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())",
    "scaled": "return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes), nn.Tanh())",
    "normed": "return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3072, classes)))",
    "plain": "return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes, bias=False))",
}


@pytest.mark.parametrize(
    ("name", "message"), [("flat", "no linear"), ("scaled", "own"), ("normed", "own"), ("plain", "")]
)
def test_models_without_a_head_are_refused(name, message, tmp_path):
    (tmp_path / "own.py").write_text(f"from torch import nn\n\n\ndef {name}(classes):\n    {OWN[name]}\n")
    config = tiny(algorithm="fedgen:server_steps=5", model=f"{tmp_path}/own.py:{name}", validation=1300)
    if message:
        with pytest.raises(UsageError, match=f"fedgen cannot use --model .*{message}"):
            prepare(config)
    else:
        experiment = prepare(config)
        start = experiment.algorithm.initial_state(experiment.setup)
        _, _, state = one_round(experiment, experiment.algorithm, 1, start, {})
        one_round(experiment, experiment.algorithm, 2, state, {})


@pytest.mark.parametrize(
    "name", ["cnn", "resnet8", "bottleneck-resnet", "mobilenetv2", "lenet:projection=8", "vit-tiny", "row-gru"]
)
def test_models_of_fedkd_have_a_head(name, experiment):
    assert experiment.setup.trainer.head(name, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_batches_of_one_are_refused():
    with pytest.raises(UsageError, match=r"--distill-batch-size cannot be 1 with fedgen's generator"):
        prepare(tiny(algorithm="fedgen", distill_batch_size=1))
