from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkd import models
from fedkd.core.errors import UsageError


def count(text: str, norm="group") -> int:
    return sum(p.numel() for p in models.build(text, 10, norm).parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnn", 66_730), ("resnet8", 78_042), ("resnet20", 272_474), ("resnet32", 466_906), ("resnet56", 855_770)],
)
def test_published_sizes(name, parameters, norm):
    assert count(name, norm) == parameters


def test_torchvisions_models():
    assert count("torchvision:resnet18") == 11_181_642  # 11.69 M for 1,000 classes, less 990 rows of 513
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        models.build("torchvision:resnet118", 10, "group")


@pytest.mark.parametrize(("name", "pixels"), [("googlenet", 32), ("inception_v3", 75)])
@pytest.mark.filterwarnings("error")
def test_networks_with_auxiliary_classifiers_are_built_without_them(name, pixels):
    model = models.build(f"torchvision:{name}", 10, "group").train()
    assert model(torch.zeros(2, 3, pixels, pixels)).shape == (2, 10)


@pytest.mark.parametrize(("name", "parameters"), [("vit-tiny", 453_226), ("row-gru", 176_138)])
def test_sizes_of_sequential_models(name, parameters):
    assert count(name) == parameters


def test_where_a_patch_lies_is_seen():
    model = models.build("vit-tiny", 10, "group").eval()
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(model(images), model(images.roll(4, -1)), atol=1e-4)
    assert not torch.allclose(model(images), model(images.mT), atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet20", "vit-tiny", "row-gru"])
@pytest.mark.parametrize("pixels", [32, 48])
def test_shapes_and_layout(name, pixels):
    model = models.build(name, 7, "group").to(memory_format=torch.channels_last)
    images = torch.randn(2, pixels, pixels, 3).permute(0, 3, 1, 2)
    assert model(images).shape == (2, 7)


def test_the_option_of_a_spec_wins_over_the_runs():
    def has_batch_norm(text: str) -> bool:
        return any(isinstance(m, torch.nn.BatchNorm2d) for m in models.build(text, 10, "group").modules())

    assert has_batch_norm("resnet8:norm=batch")
    assert not has_batch_norm("resnet8")


def test_commas_of_a_list_differ_from_those_of_options():
    text = "cnn,resnet8:norm=batch,width=8,torchvision:resnet18,cnn:width=4"
    assert models.split(text) == ["cnn", "resnet8:norm=batch,width=8", "torchvision:resnet18", "cnn:width=4"]
    assert models.split("cnn,width=4,pretrained=a.pt,resnet8") == ["cnn:width=4,pretrained=a.pt", "resnet8"]


def test_logits_with_group_norm_do_not_depend_on_the_batch():
    model = models.build("resnet8", 10, "group")
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


@pytest.mark.parametrize("pixels", [32, 40])
def test_pooling_before_relu_changes_no_bit(pixels, generator):
    """Against the same layers in the usual order: logits and gradients."""
    model = models.build("cnn", 10, "group")
    usual = nn.Sequential(*model)
    for place in (1, 4, 7):
        usual[place], usual[place + 1] = nn.ReLU(), nn.MaxPool2d(2)
    usual[9] = nn.AdaptiveAvgPool2d(4)
    images = torch.randn(8, 3, pixels, pixels, generator=generator)
    logits, expected = model(images), usual(images)
    assert torch.equal(logits, expected)
    ours = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
