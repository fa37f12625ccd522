"""Networks are trained and predict in the precision of a run; everything else is IEEE float32."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms import aggregators
from fedkd.core import seeds
from fedkd.core.errors import UsageError
from fedkd.distill import train as distill_train
from fedkd.distill.config import DistillConfig
from fedkd.distill.task import prepare as prepare_distillation
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models, networks, optimizers, precision, together
from fedkd.training.loop import Augmentation, Embedded, Scaling
from fedkd.training.terms import Features
from fedkd.training.terms.objective import DistillationObjective
from tests.conftest import simulated, tiny

SETTINGS = torch.backends.cuda.matmul, torch.backends.cudnn
SCALING = Scaling((120.0,) * 3, (60.0,) * 3)


def allowed() -> tuple[bool, ...]:
    """Whether PyTorch may use TF32 now, for products of matrices and for convolutions."""
    return tuple(each.allow_tf32 for each in SETTINGS)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cuda", (9, 0), "tf32"), ("cuda:1", (8, 0), "tf32"), ("cuda", (7, 5), "float32"), ("cpu", (9, 0), "float32")],
)
def test_auto_is_the_fastest_precision_in_which_float32_is_all_that_a_user_sees(
    device, capability, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.resolve("auto", device) == expected
    assert precision.resolve("float32", device) == "float32"
    for name in ("tf32", "bfloat16"):
        if expected == "tf32":
            assert precision.resolve(name, device) == name
        else:
            with pytest.raises(
                UsageError, match=rf"--precision {name} cannot be used on {device}.*use float32 or auto"
            ):
                precision.resolve(name, device)


def test_outside_of_networks_a_gpu_computes_in_ieee_float32():
    assert allowed() == (False, False)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_after_an_error_products_are_ieee_again(name):
    with precision.computing("float32"):
        with suppress(ZeroDivisionError), precision.computing(name):
            assert allowed() == (name != "float32",) * 2
            raise ZeroDivisionError
        assert allowed() == (False, False)


class Watched(nn.Module):
    """A network that notes whether TF32 is allowed, and fails if it is told to."""

    def __init__(self, pixels: int = 2) -> None:
        super().__init__()
        self.layer, self.seen, self.fails = nn.Linear(3 * pixels**2, 10), [], False

    def forward(self, x):
        self.seen.append(allowed())
        if self.fails:
            raise ZeroDivisionError
        return self.layer(x.flatten(1))


def train(network: nn.Module, name: precision.Precision, objective=F.cross_entropy, pixels: int = 2, rate=0.01) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
    step = optimizers.sgd(list(network.parameters()), 0.9, 1e-3)
    options = {"epochs": 2, "batch_size": 16, "augmentation": Augmentation(), "seed": 0, "precision": name}
    options["rates"] = [rate]
    loop.train(network, step, images, torch.arange(40) % 10, objective, SCALING, **options)


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_only_the_plain_loop_and_prediction_have_the_precision(name):
    network, pixels = Watched(), torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    train(network, name)
    loop.predict(network, pixels, SCALING, name)
    assert set(network.seen) == {(name != "float32",) * 2}
    network.fails = True
    for call in (lambda: train(network, name), lambda: loop.predict(network, pixels, SCALING, name)):
        with pytest.raises(ZeroDivisionError):
            call()
        assert allowed() == (False, False)


@pytest.mark.parametrize("together_", [False, True], ids=["plain", "stacked"])
def test_a_trainer_hands_its_precision_to_what_it_computes_and_to_nothing_else(together_, monkeypatch):
    experiment = prepare(tiny(validation=1300))
    monkeypatch.setattr("fedkd.training.together.pays", lambda _: together_)
    trainer = dataclasses.replace(experiment.setup.trainer, precision="tf32")
    client, inside, outside = experiment.client(0, 1, {}), [], []
    start = trainer.initial_weights(client.model)

    def task():
        outside.append(allowed())
        weights = trainer.train(client, start)
        outside.append(allowed())
        logits = trainer.predict(client.model, weights, client.data.pixels)
        outside.append(allowed())
        return logits

    for kept in (networks._why_not, networks.bytes_of):  # in float64 or without results
        kept(trainer._network(client.model), *client.data.pixels.shape[1:3])
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: inside.append(allowed()))
    try:
        list(together.run([task] * 2)) if together_ else task()
    finally:
        hook.remove()
    assert set(inside) == {(True, True)}
    assert set(outside) == {(False, False)}


def test_in_a_run_teachers_are_aggregated_in_ieee_float32(tmp_path, monkeypatch):
    """Where a product of matrices of logits in TF32 would change the teacher, and so every method's result."""
    seen, original = {"aggregator": set(), "network": set()}, aggregators.mean_probs

    def watching(*arguments, **options):
        seen["aggregator"].add(allowed())
        return original(*arguments, **options)

    linear = F.linear
    monkeypatch.setattr(precision, "resolve", lambda *_: "tf32")
    monkeypatch.setattr(aggregators, "mean_probs", watching)
    monkeypatch.setattr(F, "linear", lambda *each: (seen["network"].add(allowed()), linear(*each))[1])
    simulated(tmp_path / "run", rounds=1, workers="1")
    assert seen["aggregator"] == {(False, False)}
    assert (True, True) in seen["network"]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["precision"] == "tf32"


def test_a_distillation_trains_and_validates_in_its_precision(monkeypatch):
    monkeypatch.setattr(precision, "resolve", lambda *_: "tf32")
    config = DistillConfig.parse({"dataset": "noise:size=60,pixels=8", "device": "cpu"})
    task, _ = prepare_distillation(config)
    network, seen = Watched(pixels=8), []
    network.register_forward_pre_hook(lambda module, _: seen.append((module.training, *allowed())))
    next(distill_train.train(network, task, config, epochs=1, seed=0))
    assert set(seen[1:]) == {(True, True, True), (False, True, True)}  # the first one is for the shapes of layers


def built(spec: str) -> nn.Module:
    with seeds.seeded(0):
        return models.build(spec, 10, "group")


SPECS = ["cnn:width=8", "resnet8:width=8,norm=batch", "vit-tiny:width=32,depth=2", "row-gru:width=16"]


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_is_for_activations_only(spec):
    """Losses, weights and logits are float32; on a CPU it is computed too, so that this is tested."""
    types, weights = [], []
    for name in ("float32", "bfloat16"):
        network, inner = built(spec), set()
        start = [parameter.detach().clone() for parameter in network.parameters()]
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda _, __, y, inner=inner: inner.add(y.dtype))

        def objective(logits, labels):
            assert logits.dtype == torch.float32
            return F.cross_entropy(logits, labels)

        train(network, name, objective, pixels=8)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        assert loop.predict(network, torch.zeros(3, 8, 8, 3, dtype=torch.uint8), SCALING, name).dtype == torch.float32
        types.append(inner)
        moved = zip(network.parameters(), start, strict=True)
        weights.append(torch.cat([(after - before).flatten() for after, before in moved]))
    assert types == [{torch.float32}, {torch.bfloat16}]
    assert 0 < (weights[0] - weights[1]).norm() < 0.2 * weights[0].norm()


def test_what_a_network_returns_beside_logits_is_float32_too():
    network, x = built("cnn:width=8"), torch.randn(4, 3, 8, 8)
    assert [each.dtype for each in precision.output_of(Embedded(network), x, "bfloat16")] == [torch.float32] * 2
    both = DistillationObjective(network, [copy.deepcopy(network)], [Features()], x, torch.arange(4))
    (student, (teacher,)) = precision.output_of(both, x, "bfloat16")
    for outputs in (student, teacher):
        assert {each.dtype for each in (outputs.logits, *outputs.layers.values())} == {torch.float32}
        assert outputs.layers


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "limit"), [("float32", 2e-4), ("tf32", 5e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("spec", SPECS)
def test_on_a_gpu_the_plain_loop_is_close_to_float32_on_a_cpu(spec, name, limit):
    network = built(spec)
    other = copy.deepcopy(network).to("cuda", memory_format=torch.channels_last)
    train(network, "float32", pixels=16, rate=1e-3)
    train(other, name, pixels=16, rate=1e-3)
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    assert max((one - another.cpu()).abs().max().item() for one, another in pairs) <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("workers", ["1", "2"], ids=["together", "one by one"])
def test_on_a_gpu_two_runs_in_a_precision_give_the_same_bits(name, workers, tmp_path):
    changes = {"device": "cuda", "precision": name, "workers": workers}
    first, again = (simulated(tmp_path / each, **changes) for each in ("first", "again"))
    assert first == again
    assert json.loads((tmp_path / "first" / "env.json").read_text())["precision"] == name
