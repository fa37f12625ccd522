"""No network with BatchNorm layers is trained on a single sample, whoever trains it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import UsageError
from fedkd.core.tensors import equal
from fedkd.simulate import header
from fedkd.simulate.experiment import prepare
from fedkd.simulate.flower import client_app
from fedkd.training import loop, optimizers
from tests.conftest import MENTORS, QUICK, simulated, tiny

NETWORK = """
from torch import nn

def pixel(*, classes):
    "Its BatchNorm layer has one value per channel and sample, so that it raises an error on one sample."
    layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, classes))
"""
SIZES = [1, 31, 32, 33, 65]
OPTIONS = QUICK | {name: f"{name}:model={{pixel}}" for name in MENTORS} | {"nfdp": "nfdp:samples=33"}


@pytest.fixture
def pixel(tmp_path) -> str:
    """The spec of a network that raises an error if it is trained on one sample."""
    (tmp_path / "mine.py").write_text(NETWORK)
    return f"{tmp_path}/mine.py:pixel"


def network(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), norm(8), nn.Linear(8, 10))


@pytest.fixture
def batches_seen(monkeypatch) -> list[tuple[bool, int]]:
    """Whether BatchNorm is in the network, and the number of samples, of each batch in training mode."""
    seen: list[tuple[bool, int]] = []
    train = loop.train

    def watching(model, *arguments, **options):
        def record(module, inputs):
            if module.training:
                seen.append((loop.has_batch_norm(module), len(inputs[0])))

        hook = model.register_forward_pre_hook(record)
        try:
            train(model, *arguments, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "train", watching)
    return seen


@pytest.mark.parametrize(
    ("count", "size", "with_it", "without"),
    [
        (1, 32, [], [1]),
        (2, 32, [2], [2]),
        (32, 32, [32], [32]),
        (33, 32, [33], [32, 1]),
        (34, 32, [32, 2], [32, 2]),
        (65, 32, [32, 33], [32, 32, 1]),
        (3, 2, [3], [2, 1]),
    ],
)
def test_a_last_batch_of_one_is_merged_if_there_is_batch_norm(count, size, with_it, without):
    for norm in (nn.BatchNorm1d, nn.LazyBatchNorm1d, nn.SyncBatchNorm):
        model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(norm() if norm is nn.LazyBatchNorm1d else norm(8)))
        assert loop.batch_sizes(model, count, size) == with_it
    for norm in (nn.LayerNorm, nn.InstanceNorm1d):
        assert loop.batch_sizes(network(norm), count, size) == without


@pytest.mark.parametrize("flip", [False, True])
def test_merging_changes_no_other_batch(flip, generator):
    """In every epoch, batches that are not merged have the same images, augmented in the same way."""
    pixels = torch.randint(256, (65, 8, 8, 3), dtype=torch.uint8, generator=generator)
    scaling = loop.Scaling.of(pixels)

    def seen(model: nn.Module) -> list[torch.Tensor]:
        images: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].detach().clone()))
        step = optimizers.sgd(list(model.parameters()), 0.0, 0.0)
        options = {"epochs": 2, "batch_size": 32, "seed": 5, "augmentation": loop.Augmentation(True, flip)}
        options["rates"] = [0.1]
        loop.train(model, step, pixels, torch.arange(65) % 10, F.cross_entropy, scaling, **options)
        return images

    merged, separate = seen(network()), seen(network(nn.LayerNorm))
    assert [len(images) for images in merged] == [32, 33] * 2
    assert [len(images) for images in separate] == [32, 32, 1] * 2
    assert torch.equal(merged[0], separate[0])
    assert torch.equal(merged[2], separate[3])  # the first batch of the second epoch


@pytest.mark.parametrize("average", [False, True])
def test_one_sample_changes_nothing(average):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    step = optimizers.sgd(list(model.parameters()), 0.9, 0.1)
    options = {"epochs": 3, "batch_size": 32, "seed": 5, "augmentation": loop.Augmentation(True), "average": average}
    options["rates"] = [0.1]
    loop.train(
        model, step, pixels, torch.zeros(1, dtype=torch.long), F.cross_entropy, loop.Scaling.of(pixels), **options
    )
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("name", sorted(CATALOG["algorithm"]))
def test_every_client_of_every_method_takes_part(name, pixel, tmp_path, batches_seen):
    """Clients, server and mentors; a client with one sample, and two with a last batch of one."""
    options = {
        "partitioner": "size:sizes=" + "+".join(map(str, SIZES)),
        "clients": 5,
        "proxy": "holdout:size=65",
    }
    algorithm = OPTIONS.get(name, name).format(pixel=pixel)
    rows = simulated(tmp_path / "run", algorithm=algorithm, model=pixel, **options)
    assert [(row["participants"], row["failures"]) for row in rows] == [(1 if name == "central" else 5, [])] * 2
    of_clients = [size for has_batch_norm, size in batches_seen if has_batch_norm]
    assert min(of_clients) > 1
    assert len(of_clients) == len(batches_seen) or name in ("fedtgp", "co-boosting")  # which train other things, too


def test_a_client_with_one_sample_sends_what_it_received(pixel):
    """Weights as they came; for SCAFFOLD, no change of its control variate."""
    experiment = prepare(tiny(partitioner="size:sizes=1+40+33", model=pixel))
    for name in ("fedavg", "scaffold"):
        algorithm = specs.call("algorithm", name)
        state = algorithm.initial_state(experiment.setup)
        message = algorithm.broadcast(experiment.setup, state, 0)
        update, _ = algorithm.local_update(experiment.setup, experiment.client(0, 1, {}), message)
        assert equal(update.tensors, message)  # c and its change are zero
        assert update.examples == 1


def test_scaffold_divides_by_the_steps_that_were_taken(pixel):
    experiment = prepare(tiny(partitioner="size:sizes=1+65+33", model=pixel, local_epochs=3, batch_size=32))
    trainer = experiment.setup.trainer
    assert [trainer.steps(experiment.client(client, 1, {})) for client in range(3)] == [0, 6, 3]


def test_what_is_not_trained_on_is_said_before_the_first_round(pixel, tmp_path, capsys):
    options = {"partitioner": "size:sizes=1+40+1", "seeds": 2, "compare": "local", "proxy_samples": 1}
    simulated(tmp_path / "run", model=f"{pixel},cnn:width=4", **options)
    out = " ".join(capsys.readouterr().out.split())
    why = "is not trained on one sample, since it has BatchNorm layers"
    for what in ("with seed 0, clients 0, 2 have one sample", "with seed 1, clients 0, 2 have one sample"):
        assert out.count(f"notice {what}; {pixel} {why}") == 1
    assert out.count(f"notice the proxy has one sample in a round; {pixel} {why}") == 1
    assert out.count(why) == 3
    assert out.rindex(why) < out.index("round ")
    assert header.too_small(prepare(tiny(partitioner="size:sizes=2+40+1", model=f"{pixel},cnn:width=4"))) != []
    assert header.too_small(prepare(tiny(partitioner="size:sizes=2+1+4", model=f"{pixel},cnn:width=4"))) == []
    mentor = {"algorithm": f"mentor:model={pixel}", "model": "cnn:width=4", "clients": 12}
    (text,) = header.too_small(prepare(tiny(partitioner="size:sizes=" + "+".join(["1"] * 12), **mentor)))
    assert text == f"with seed 0, clients 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 others have one sample; {pixel} {why}"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 1}, "--batch-size"),
        ({"distill_batch_size": 1}, "--distill-batch-size"),
        ({"batch_size": 1, "model": "cnn:width=4", "algorithm": "mentor:model={pixel}"}, "--batch-size"),
        ({"algorithm": "nfdp:samples=1"}, "nfdp:samples"),
    ],
)
def test_batches_of_one_are_refused(options, named, pixel):
    options = {key: value.format(pixel=pixel) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UsageError, match=f"^{named} cannot be 1 with {pixel}, whose BatchNorm layers"):
        prepare(tiny(**{"model": pixel, **options}))
    prepare(tiny(**{"model": "cnn:width=4", **options, "algorithm": "ensemble"}))  # without BatchNorm


def test_a_node_with_one_image_of_its_own_says_so(pixel, monkeypatch):
    config = tiny(partitioner="own", clients=1, model=pixel)
    images = prepare(tiny(clients=1)).train
    message = SimpleNamespace(content={"config": None})
    context = SimpleNamespace(node_config={"partition-id": 0, "data": "here"}, state={})
    monkeypatch.setattr(client_app, "_config", lambda _: {"round": 1, "memory": 0, "run": "x"})
    monkeypatch.setattr(client_app, "_run_of", lambda *_: config)
    for count in (2, 1):
        monkeypatch.setattr(client_app, "node_data", lambda *_, count=count: images.first(count))
        refused = pytest.raises(UsageError, match=r"the number of images in here cannot be 1 with .*pixel")
        with refused if count == 1 else contextlib.nullcontext():
            client_app._client(message, context)
