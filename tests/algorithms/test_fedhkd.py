"""FedHKD: local training, what clients send, and the server's means against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms.base import Update
from fedkd.algorithms.fedhkd import PredictionLoss
from fedkd.core import specs
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models, together
from tests.algorithms.test_methods import one_round
from tests.conftest import tiny

GAMMA, LAMBDA, T = 2.0, 3.0, 0.5
NAME = f"fedhkd:weight={GAMMA},prediction_weight={LAMBDA}"


def slow_loss(embeddings, logits, labels, head, knowledge):
    """The authors': cross-entropy, mean of KL over classes and entries, mean squared error, number by number."""
    known = [c for c in range(10) if knowledge["counts"][c] > 0]
    total = F.cross_entropy(logits, labels)
    for c in known:
        q, target = (head(knowledge["prototypes"][c]) / T).softmax(0), knowledge["predictions"][c]
        entries = [p * (p / own).log() for p, own in zip(target, q, strict=True) if p > 0]
        total = total + LAMBDA * sum(entries) / (len(known) * 10)
    pulls = [
        (embedding - knowledge["prototypes"][label]).square().sum()
        for embedding, label in zip(embeddings, labels.tolist(), strict=True)
        if label in known
    ]
    return total + GAMMA * sum(pulls) / embeddings.numel()


@pytest.mark.parametrize("is_together", [False, True])
def test_local_training_is_the_authors(is_together, monkeypatch):
    """In the second round, by SGD written out; some classes are unknown to all."""
    monkeypatch.setattr(together, "pays", lambda _: is_together)
    options = {"clients": 12, "local_epochs": 2, "augment": "true", "learning_rate": 0.01}
    experiment = prepare(tiny(algorithm=NAME, partitioner="dirichlet:alpha=0.3", **options))
    algorithm, setup, config = experiment.algorithm, experiment.setup, experiment.config
    first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {}, (2, 5))
    first[2]["counts"][4] = 0
    updates, _, _ = one_round(experiment, algorithm, 2, first[2], first[1], (2, 5))
    for number in (2, 5):
        client = experiment.client(number, 2, first[1][number])
        module = models.build(setup.student, setup.classes, config.norm).to(memory_format=torch.channels_last)
        module.load_state_dict(take("student", first[2]))
        head, seen = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1], []
        hook = head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        sgd = torch.optim.SGD(module.parameters(), config.learning_rate, config.momentum, 0, config.weight_decay)
        batches = torch.Generator().manual_seed(client.derive("fit"))
        for _ in range(config.local_epochs):
            for rows in loop.batches(loop.batch_sizes(module.train(), len(client.data), config.batch_size), batches):
                augmentation = loop.Augmentation(config.augment, setup.trainer.flip)
                x = setup.trainer.scaling(augmentation(client.data.pixels[rows], rows, batches))
                seen.clear()
                logits = module(x)
                sgd.zero_grad()
                slow_loss(seen[0], logits, client.data.labels[rows], head, first[2]).backward()
                sgd.step()
        expected, start = module.state_dict(), take("student", first[2])
        moved = max(float((p.detach() - start[name]).abs().max()) for name, p in module.named_parameters())
        sent = updates[number].tensors
        for name, tensor in expected.items():
            assert torch.allclose(sent[f"student/{name}"].float(), tensor.float(), atol=1e-3 * moved, rtol=0), name
        seen.clear()
        with torch.no_grad():
            logits = module.eval()(setup.trainer.scaling(client.data.pixels))
        hook.remove()
        labels = client.data.labels
        for c in range(10):
            rows = labels == c
            assert sent["counts"][c] == rows.sum()
            if not rows.any():
                assert not sent["prototypes"][c].any()
                assert not sent["predictions"][c].any()
                continue
            assert torch.allclose(sent["prototypes"][c], seen[0][rows].mean(0), atol=1e-3)
            assert torch.allclose(sent["predictions"][c], (logits[rows] / T).softmax(1).mean(0), atol=1e-3)


def test_the_distance_of_known_predictions():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 0.1308 for the one class that is known, over two classes."""
    tensors = {
        "prototypes": torch.tensor([[7.0], [1.0]]),
        "predictions": torch.tensor([[0.75, 0.25], [0.0, 0]]),
        "is_known": torch.tensor([True, False]),
    }
    zero = {"model.head.weight": torch.zeros(2, 1), "model.head.bias": torch.zeros(2)}
    loss = PredictionLoss("model.head", 3, 0.5)(zero, tensors)
    assert float(loss) == pytest.approx(3 * 0.1308120359 / 2, abs=1e-6)
    # With logits (0, ln(3) / 2) at T = 0.5: KL((3/4, 1/4) || (1/4, 3/4)) = ln(3) / 2.
    turned = {"model.head.weight": torch.zeros(2, 1), "model.head.bias": torch.tensor([0, math.log(3) / 2])}
    assert float(PredictionLoss("model.head", 3, 0.5)(turned, tensors)) == pytest.approx(3 * math.log(3) / 4, abs=1e-6)
    tensors["is_known"] = torch.tensor([False, False])
    assert float(PredictionLoss("model.head", 3, 0.5)(turned, tensors)) == 0


def test_the_server_weights_classes_by_their_samples(experiment):
    algorithm, setup = specs.call("algorithm", "fedhkd"), experiment.setup
    start = algorithm.initial_state(setup)
    width, student = start["prototypes"].shape[1], {k: v for k, v in start.items() if k.startswith("student/")}
    before = {**start, "prototypes": torch.full((10, width), 9.0), "predictions": torch.full((10, 10), 0.1)}
    before["counts"] = torch.ones(10, dtype=torch.int64)
    updates = {}
    for number, (value, own) in enumerate([(1.0, [2, 1]), (5.0, [6, 0])]):
        counts = torch.tensor([*own, *[0] * 8])
        tensors = {"prototypes": torch.full((10, width), value), "predictions": torch.eye(10).roll(number, 1)}
        updates[number] = Update({**student, **tensors, "counts": counts}, sum(own))
    state = algorithm.aggregate(setup, before, updates, seed=0)
    assert torch.allclose(state["prototypes"][:, 0], torch.tensor([4.0, 1, *[9] * 8]))
    assert torch.allclose(state["predictions"][0], torch.tensor([0.25, 0.75, *[0] * 8]))
    assert torch.allclose(state["predictions"][1:], torch.stack([torch.eye(10)[1], *torch.full((8, 10), 0.1)]))
    assert state["counts"].tolist() == [8, 1, *[1] * 8]


@pytest.mark.parametrize("options", ["", ":weight=0,prediction_weight=0"])
def test_it_is_fedavg_in_the_first_round_and_without_weights(options, experiment):
    setup, plain = experiment.setup, specs.call("algorithm", "fedavg")
    algorithm = specs.call("algorithm", f"fedhkd{options}")
    state, memories, student = algorithm.initial_state(setup), {}, plain.initial_state(setup)
    for number in (1, 2) if options else (1,):
        updates, memories, state = one_round(experiment, algorithm, number, state, memories)
        expected, _, student = one_round(experiment, plain, number, student, {})
        assert equal(take("student", updates[0].tensors), expected[0].tensors)
    assert equal(algorithm.global_model(setup, state), student)


def test_a_model_without_a_head_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\ndef scaled(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes), nn.Tanh())\n"
    )
    with pytest.raises(UsageError, match=r"fedhkd cannot use --model .*last linear layer"):
        prepare(tiny(algorithm="fedhkd", model=f"{tmp_path}/own.py:scaled"))
