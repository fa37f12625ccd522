"""FedGKT (He et al., 2020) against its formulas, written out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from fedkd.algorithms.base import Update
from fedkd.core import specs
from fedkd.core.communication.validation import validate_update
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal, take
from fedkd.simulate.experiment import prepare
from fedkd.training import layers, models
from tests.conftest import simulated, tiny

GKT = "fedgkt:private-features=true"
RESNETS = {"model": "resnet8:width=8", "student": "resnet20:width=8"}
ONE_STEP = {"local_steps": 1, "batch_size": 2000, "augment": False, "momentum": 0.0, "weight_decay": 0.0}


def loss(logits, labels, probs, weight, temperature):
    """CE + weight * T^2 * KL(probs || softmax(logits / T)), sample by sample."""
    total = torch.zeros(())
    for row, label, wanted in zip(logits, labels, probs, strict=True):
        own = (row / temperature).softmax(-1)
        divergence = sum(p * (p / q).log() for p, q in zip(wanted, own, strict=True) if p > 0)
        total = total - row.softmax(-1)[label].log() + weight * temperature**2 * divergence
    return total / len(logits)


def network(setup, spec, weights):
    module = models.build(spec, setup.classes, setup.config.norm)
    module.load_state_dict(weights)
    return module


@pytest.fixture(scope="module")
def experiment():
    return prepare(tiny(algorithm=f"{GKT},weight=0.7,temperature=2", distill_batch_size=2000, **RESNETS, **ONE_STEP))


@pytest.fixture(scope="module")
def first_round(experiment):
    """The updates, the memories and the server's state after the first round."""
    algorithm, setup = experiment.algorithm, experiment.setup
    state = algorithm.initial_state(setup)
    results = [algorithm.local_update(setup, experiment.client(k, 1, {}), {}) for k in range(3)]
    updates = {k: update for k, (update, _) in enumerate(results)}
    return updates, [memory for _, memory in results], algorithm.aggregate(setup, state, updates, seed=1)


def test_nothing_private_is_sent_unless_asked_for():
    with pytest.raises(UsageError, match=r"^fedgkt sends feature maps, logits and labels of private"):
        specs.call("algorithm", "fedgkt")
    assert specs.call("algorithm", GKT).private_features


def test_a_client_sends_what_its_model_says_of_its_samples(experiment, first_round):
    """After training, in evaluation mode, in the order of its samples; the first round has no teacher."""
    setup, data = experiment.setup, experiment.client(1, 1, {}).data
    update, memory = first_round[0][1], first_round[1][1]
    images = setup.trainer.scaling(data.pixels)

    plain = network(setup, setup.models[0], setup.trainer.initial_weights(setup.models[0])).train()
    F.cross_entropy(plain(images), data.labels).backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= setup.config.learning_rate * parameter.grad
    trained = take("model", memory)
    assert all(torch.allclose(trained[name], tensor, atol=1e-5) for name, tensor in plain.state_dict().items())

    module = network(setup, setup.models[0], trained).eval()
    with torch.no_grad():
        maps = module.stem(images).relu()
        assert torch.allclose(update.tensors["maps"], maps.permute(0, 2, 3, 1), atol=1e-5)
        assert torch.allclose(update.tensors["outputs"], module(images), atol=1e-4)
    assert torch.equal(update.tensors["labels"], data.labels)


def test_one_step_of_the_server_is_the_step_written_out(experiment, first_round):
    """Adam on CE + weight * T^2 KL(clients || server), over the samples of all clients. Its first layers stay."""
    setup, (updates, _, state) = experiment.setup, first_round
    start = take("student", experiment.algorithm.initial_state(setup))
    module = network(setup, setup.student, start).train()
    maps, outputs, labels = (torch.cat([u.tensors[n] for u in updates.values()]) for n in ("maps", "outputs", "labels"))
    adam = torch.optim.Adam(module.parameters(), setup.config.distill_learning_rate)
    loss(module.classify(maps.permute(0, 3, 1, 2)), labels, (outputs / 2).softmax(-1), 0.7, 2).backward()
    adam.step()
    ours = take("student", state)
    for name, tensor in module.state_dict().items():
        assert (ours[name] - tensor).abs().mean() < 1e-5, name  # rounding may turn the sign of a gradient near zero
        assert name.startswith("stem.") == torch.equal(ours[name], start[name]), name


def test_the_server_sends_its_outputs_in_evaluation_mode():
    """The public code sends those of training, in which BatchNorm mixes the samples of a batch."""
    experiment = prepare(tiny(algorithm=GKT, norm="batch"))
    algorithm, setup = experiment.algorithm, experiment.setup
    updates = {k: algorithm.local_update(setup, experiment.client(k, 1, {}), {})[0] for k in (0, 2)}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    module = network(setup, setup.student, take("student", state)).eval()
    for client, update in updates.items():
        with torch.no_grad():
            outputs = module[3:](update.tensors["maps"].permute(0, 3, 1, 2))
        assert torch.allclose(algorithm.broadcast(setup, state, client)["outputs"], outputs, atol=1e-4)
    assert algorithm.broadcast(setup, state, 1) == {}


def test_one_step_of_a_client_is_the_step_written_out(experiment, first_round):
    """In the second round: SGD on CE + weight * T^2 KL(server || client)."""
    setup, client = experiment.setup, experiment.client(0, 2, first_round[1][0])
    message = experiment.algorithm.broadcast(setup, first_round[2], 0)
    _, memory = experiment.algorithm.local_update(setup, client, message)
    module = network(setup, client.model, take("model", client.memory)).train()
    logits = module(setup.trainer.scaling(client.data.pixels))
    loss(logits, client.data.labels, (message["outputs"] / 2).softmax(-1), 0.7, 2).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= setup.config.learning_rate * parameter.grad
    ours = take("model", memory)
    assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in module.state_dict().items())


def test_a_client_is_evaluated_with_its_own_first_layers_and_those_of_the_server(experiment, first_round):
    setup, (_, memories, state) = experiment.setup, first_round
    message = experiment.algorithm.evaluation_message(setup, state)
    model, weights = experiment.algorithm.evaluated_model(setup, 2, memories[2], message)
    own = network(setup, setup.models[0], take("model", memories[2])).eval()
    large = network(setup, setup.student, take("student", state)).eval()
    with torch.no_grad():
        expected = large.classify(own.extract(setup.trainer.scaling(experiment.test.pixels[:20])))
    assert torch.allclose(setup.trainer.predict(model, weights, experiment.test.pixels[:20]), expected, atol=1e-4)
    assert not equal(weights, message)


def test_a_run_reports_these_models_and_counts_their_bytes_apart(tmp_path):
    """The accuracy is the mean over clients; the layers of the server are sent for the evaluation only."""
    rows = simulated(tmp_path / "run", algorithm=GKT, evaluate_every=2, **RESNETS)
    layers_of_server = sum(
        4 * tensor.numel() for tensor in models.build("resnet20:width=8", 10, "group").state_dict().values()
    )
    assert rows[0]["downlink_float32_bytes"] == rows[0]["evaluation_bytes"] == 0
    samples = sum(entry["samples"] for entry in rows[1]["clients"])
    assert rows[1]["downlink_float32_bytes"] == 4 * 10 * samples
    assert rows[1]["uplink_float32_bytes"] == samples * (4 * 8 * 32 * 32 + 4 * 10 + 8)
    assert rows[1]["evaluation_bytes"] > 3 * layers_of_server
    assert rows[1]["test_loss"] is None
    assert rows[1]["test_accuracy"] > 0.15
    assert json.loads((tmp_path / "run" / "result.json").read_text())["runs"][0]["break_even_proxy_size"] is None


def test_a_client_with_more_samples_sends_the_same_part_of_them_in_each_round():
    experiment = prepare(tiny(algorithm=f"{GKT},samples=30"))
    algorithm, setup = experiment.algorithm, experiment.setup
    first, memory = algorithm.local_update(setup, experiment.client(0, 1, {}), {})
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), {0: first}, seed=1)
    message = algorithm.broadcast(setup, state, 0)
    second, _ = algorithm.local_update(setup, experiment.client(0, 2, memory), message)
    other, _ = algorithm.local_update(setup, experiment.client(1, 1, {}), {})
    assert len(message["outputs"]) == len(first.tensors["labels"]) == 30 < len(experiment.client(0, 1, {}).data)
    assert torch.equal(first.tensors["labels"], second.tensors["labels"])
    assert not torch.equal(first.tensors["labels"], other.tensors["labels"])
    assert validate_update(first, algorithm.upload_spec(setup, 0, 1)) == algorithm.check_update(setup, first) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": torch.full((30,), 10)}, "labels that do not exist"),
        ({"labels": torch.full((30,), -1)}, "labels that do not exist"),
        ({"labels": torch.zeros(29, dtype=torch.int64)}, "other numbers of feature maps"),
        ({"maps": torch.zeros(31, 16, 16, 8)}, "maps of shape"),
    ],
)
def test_a_server_refuses_what_does_not_fit(changes, reason):
    experiment = prepare(tiny(algorithm=f"{GKT},samples=30"))
    algorithm, setup = experiment.algorithm, experiment.setup
    maps, outputs = torch.zeros(30, 16, 16, 8), torch.zeros(30, 10)
    good = Update({"maps": maps, "outputs": outputs, "labels": torch.zeros(30, dtype=torch.int64)}, 100)

    def fault(update):
        return validate_update(update, algorithm.upload_spec(setup, 0, 1)) or algorithm.check_update(setup, update)

    assert fault(good) == ""
    assert reason in fault(dataclasses.replace(good, tensors={**good.tensors, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "vit-tiny"}, "fedgkt cannot use --model vit-tiny: it is neither one of fedkd's ResNets nor"),
        ({"student": "resnet8:width=16", "model": "resnet8:width=8"}, "resnet8:width=8 has others than --student"),
        ({"distill_patience": 5, "validation": 100}, "fedgkt cannot use --distill-patience"),
    ],
)
def test_models_and_options_that_it_cannot_use(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        prepare(tiny(algorithm=GKT, **changes))


@pytest.mark.parametrize("name", ["cnn:width=8", "resnet8:width=8", "wrn-16-2:width=8", "vgg9:width=8", "lenet"])
def test_the_two_halves_of_a_model_are_the_model(name):
    torch.manual_seed(0)
    module, x = models.build(name, 10, "group").eval(), torch.randn(2, 3, 32, 32)
    maps = layers.Extractor(module)(x)
    assert maps.shape[0] == 2
    assert torch.equal(layers.Tail(module)(layers.channels_first(maps)), module(x))
