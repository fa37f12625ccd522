from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms.fedavg import FedProx
from fedkd.core import seeds, specs
from fedkd.data.augment import PAD, crop_and_flip
from fedkd.training import loop, optimizers, schedules
from fedkd.training.loop import Augmentation, Scaling
from fedkd.training.objectives import Bound
from tests.conftest import ROOT


@pytest.fixture
def pixels(generator) -> torch.Tensor:
    return torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def labels(generator) -> torch.Tensor:
    return torch.randint(10, (50,), generator=generator)


def small() -> nn.Module:
    with seeds.seeded(3):
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))


def train(model: nn.Module, pixels, labels, **changes) -> nn.Module:
    options = {"rates": [0.1], "epochs": 2, "batch_size": 16, "augmentation": Augmentation(), "seed": 7} | changes
    step = optimizers.sgd(list(model.parameters()), 0.9, 0.0)
    loop.train(model, step, pixels, labels, F.cross_entropy, Scaling.of(pixels), **options)
    return model


def test_scaling_uses_the_mean_and_standard_deviation(pixels):
    scaling = Scaling.of(pixels)
    flat = pixels.numpy().reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(scaling.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.std, flat.std(0), rtol=1e-9)
    seen = scaling(pixels)
    assert seen.shape == (50, 3, 32, 32)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert abs(seen.mean().item()) < 1e-5
    assert seen.std().item() == pytest.approx(1, abs=1e-3)


def test_a_constant_channel_is_not_divided_by_zero():
    assert Scaling.of(torch.full((4, 8, 8, 3), 9, dtype=torch.uint8)).std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_against_one_image_at_a_time(pixels, flip):
    batch = crop_and_flip(pixels, flip, torch.Generator().manual_seed(1))
    padded = F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD)).numpy()
    flipped = 0
    for image, whole in zip(batch.numpy(), padded, strict=True):
        cuts = [whole[y : y + 32, x : x + 32] for y in range(2 * PAD + 1) for x in range(2 * PAD + 1)]
        straight = any(np.array_equal(image, cut) for cut in cuts)
        mirrored = any(np.array_equal(image, cut[:, ::-1]) for cut in cuts)
        assert straight or (flip and mirrored)
        flipped += mirrored and not straight
    assert (10 < flipped < 40) if flip else flipped == 0


def test_only_the_first_samples_are_augmented(pixels):
    indices = torch.arange(50).flip(0)
    seen, every = (
        Augmentation(True, True, first)(pixels, indices, torch.Generator().manual_seed(1)) for first in (20, None)
    )
    assert torch.equal(seen[:30], pixels[:30])
    assert torch.equal(seen[30:], every[30:])
    assert not torch.equal(every[:30], pixels[:30])


def test_train_is_a_plain_loop(pixels, labels):
    """Against the same steps with torch.optim."""
    model = train(small(), pixels, labels)
    oracle, scaling = small(), Scaling.of(pixels)
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        order = torch.randperm(50, generator=generator)
        for start in range(0, 50, 16):
            rows = order[start : start + 16]
            images = (
                pixels[rows].permute(0, 3, 1, 2).float() - torch.tensor(scaling.mean).view(3, 1, 1)
            ) / torch.tensor(scaling.std).view(3, 1, 1)
            optimizer.zero_grad()
            F.cross_entropy(oracle(images), labels[rows]).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_proximal_term_is_fedproxs(pixels, labels):
    start = {name: value.clone() for name, value in small().state_dict().items()}
    model = small()
    with torch.no_grad():
        model[2].weight += 0.5
        model[2].bias -= 0.25
    expected = 0.5 * 0.3 * (48 * 10 * 0.25 + 10 * 0.0625)
    assert FedProx(mu=0.3).proximal(dict(model.named_parameters()), start).item() == pytest.approx(expected, rel=1e-5)
    free = train(small(), pixels, labels, epochs=6)
    held = train(small(), pixels, labels, epochs=6, penalty=Bound(FedProx(mu=3.0).proximal, start))
    distances = [sum((p - start[n]).square().sum() for n, p in m.named_parameters()) for m in (free, held)]
    assert distances[1] < 0.5 * distances[0]


class Dropping(nn.Module):
    """Dropout uses torch's global generator: the seed must reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = small(), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.net(x))


@pytest.mark.parametrize("kind", [small, Dropping])
def test_the_seed_decides_order_augmentation_and_dropout(kind, pixels, labels):
    def weights(seed: int, stream: int) -> torch.Tensor:
        with seeds.seeded(3):
            model = kind()
        torch.manual_seed(stream)
        train(model, pixels, labels, seed=seed, augmentation=Augmentation(True, True))
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1, stream=0), weights(1, stream=99))
    assert not torch.equal(weights(1, stream=0), weights(2, stream=0))


def test_a_single_image_and_a_batch_larger_than_the_data(pixels, labels):
    for norm in ("group", "batch"):
        from fedkd.training.models import build

        model = build("resnet8:width=8", 10, norm)
        train(model, pixels[:1], labels[:1], epochs=1)
        assert all(p.isfinite().all() for p in model.parameters())


def test_predict_is_in_evaluation_mode_and_does_not_depend_on_chunks(pixels, monkeypatch):
    from fedkd.training.models import build

    model = build("resnet8:width=8", 10, "batch")
    scaling = Scaling.of(pixels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = loop.predict(model.train(), pixels, scaling)
    monkeypatch.setattr(loop, "CPU_CHUNK", 7)
    assert torch.allclose(loop.predict(model, pixels, scaling), logits, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not logits.requires_grad
    assert not logits.is_inference()


def test_score():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    accuracy, loss = loop.score(logits, torch.tensor([0, 1, 1]))
    assert accuracy == pytest.approx(2 / 3)
    assert loss == pytest.approx((2 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 3)


OPTIMIZERS = {
    "sgd": ((0.9, 5e-4), {"momentum": 0.9, "weight_decay": 5e-4}),
    "sgd:nesterov=true": ((0.9, 5e-4), {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    "adam": ((), {}),
    "adam:beta1=0.5,beta2=0.99": ((0.1,), {"weight_decay": 0.1, "betas": (0.5, 0.99)}),
    "adamw": ((0.1,), {"weight_decay": 0.1}),
    "adamw:beta1=0.5": ((0.0,), {"weight_decay": 0.0, "betas": (0.5, 0.999)}),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["a number", "a tensor"])
@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_optimizers_are_bitwise_equal_to_torch_optim(spec, as_tensor, pixels, labels):
    """Over some steps, in channels_last; a frozen parameter stays, one without gradient counts as zero."""

    def convolutional() -> nn.Module:
        with seeds.seeded(3):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 900, 10), nn.Linear(2, 2))
        model[2].bias.requires_grad_(False)
        return model.to(memory_format=torch.channels_last)

    ours, theirs = convolutional(), convolutional()
    used = [p for p in theirs.parameters() if p.requires_grad]
    numbers, options = OPTIMIZERS[spec]
    step = specs.built_in("optimizer", spec)(list(ours.parameters()), *numbers)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.partition(":")[0]]
    oracle = kind(used, lr=1.0, fused=True, **options)
    images = Scaling.of(pixels)(pixels)
    for rate in (0.01, 0.01, 0.002, 0.03):
        for model in (ours, theirs):
            F.cross_entropy(model[2](model[1](model[0](images))), labels).backward()
        for parameter in theirs[3].parameters():
            parameter.grad = torch.zeros_like(parameter)
        oracle.param_groups[0]["lr"] = rate
        step(optimizers.rates_for([rate], 1, torch.device("cpu"))[0] if as_tensor else rate)
        oracle.step()
        oracle.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is None
        assert torch.equal(mine, other)
    assert torch.equal(ours[2].bias, convolutional()[2].bias)


SCHEDULERS = torch.optim.lr_scheduler
SCHEDULES = {
    "constant": lambda optimizer: SCHEDULERS.ConstantLR(optimizer, 1.0),
    "cosine": lambda optimizer: SCHEDULERS.CosineAnnealingLR(optimizer, 12),
    "exponential:gamma=0.9": lambda optimizer: SCHEDULERS.ExponentialLR(optimizer, 0.9),
    "step:milestones=3+5+9,gamma=0.2": lambda optimizer: SCHEDULERS.MultiStepLR(optimizer, [3, 5, 9], 0.2),
}


@pytest.mark.parametrize("spec", SCHEDULES)
def test_schedules_are_those_of_torch(spec):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, wanted = SCHEDULES[spec](optimizer), []
    for _ in range(12):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert schedules.rates(spec, 0.3, 12) == pytest.approx(wanted, rel=1e-12)
    if spec != "cosine":  # in epochs of four steps
        each = schedules.rates(spec, 0.3, 48, 4)
        assert each[::4] == each[3::4] == schedules.rates(spec, 0.3, 12)


def test_each_step_has_its_rate_and_the_last_one_goes_on(pixels, labels):
    """Of eight steps only those with a rate above zero change anything."""

    def after(*rates: float) -> list[torch.Tensor]:
        return list(train(small(), pixels, labels, rates=rates).parameters())

    assert all(map(torch.equal, after(0.1, 0.0), after(0.1, *[0.0] * 7)))
    assert all(map(torch.equal, after(0.0), small().parameters()))
    assert not torch.equal(after(0.1, 0.0)[0], after(0.0)[0])
    assert not torch.equal(after(0.1, 0.0)[0], after(0.1)[0])


def test_training_does_not_import_the_compiler():
    code = (
        "import sys; from fedkd.core.runtime import settle; settle(1);"
        "from tests.conftest import tiny; from fedkd.simulate.experiment import prepare;"
        "e = prepare(tiny()); t = e.setup.trainer; t.train(e.client(0, 1, {}), t.initial_weights('cnn:width=8'));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
