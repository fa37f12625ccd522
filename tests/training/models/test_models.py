from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.core.catalog import CATALOG
from fedkd.core.errors import PluginError, UsageError
from fedkd.training import models
from fedkd.training.models import convolutional


def count(text: str, norm="group", classes: int = 10) -> int:
    return sum(p.numel() for p in models.build(text, classes, norm).parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnn", 66_730), ("resnet8", 78_042), ("resnet20", 272_474), ("resnet32", 466_906), ("resnet56", 855_770)],
)
def test_published_sizes(name, parameters, norm):
    assert count(name, norm) == parameters


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("text", "classes", "parameters"),
    [
        # The code of RepDistiller, 100 classes
        ("resnet20", 100, 278_324),
        ("resnet56", 100, 861_620),
        ("resnet110", 100, 1_736_564),
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("wrn-16-2", 100, 703_284),
        ("wrn-40-1", 100, 569_780),
        ("wrn-40-2", 100, 2_255_156),
        ("vgg8", 100, 3_965_028),
        ("vgg13", 100, 9_462_180),
        ("mobilenetv2:width=0.5", 100, 812_836),
        # 61.01 MB in float32 (CFD)
        ("vgg16", 10, 15_253_578),
        # FedGEMS: ResNet-11; FedML: the ResNet-56 of bottleneck blocks
        ("bottleneck-resnet", 10, 127_642),
        ("bottleneck-resnet:blocks=6+6+6", 10, 591_322),
        # The CNN of PyTorch's tutorial, which MOON uses, and its form for MNIST; McMahan et al. (2017)
        ("lenet", 10, 62_006),
        ("lenet:pixels=28,gray=true", 10, 44_426),
        ("mcmahan-cnn:pixels=28,gray=true", 10, 1_663_370),
    ],
)
def test_sizes_of_the_models_of_published_tables(text, classes, parameters, norm):
    assert count(text, norm, classes) == parameters


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Give a network the parameters of another one, whose layers are in the same order."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)


def test_resnet18_is_torchvisions_without_its_first_pooling():
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours, images = models.build("resnet18", 10, "batch"), torch.randn(4, 3, 16, 16)
    copied(ours, theirs)
    assert torch.allclose(ours(images), theirs(images), atol=1e-4)


def test_blocks_are_torchvisions():
    from torchvision.models import mobilenetv2, resnet

    x = torch.randn(4, 16, 8, 8)
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    ours, theirs = convolutional.Bottleneck(16, 8, "batch", 2), resnet.Bottleneck(16, 8, 2, down)
    copied(ours, theirs)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    for outputs, stride in ((16, 1), (24, 1), (24, 2)):
        ours = convolutional.InvertedResidual(16, outputs, "batch", stride, 6)
        theirs = mobilenetv2.InvertedResidual(16, outputs, stride, 6)
        for module in theirs.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU6):  # RepDistiller has ReLU
                    setattr(module, name, nn.ReLU())
        copied(ours, theirs)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(("outputs", "stride"), [(16, 1), (32, 2), (32, 1)])
def test_a_block_of_a_wide_resnet_is_that_of_the_paper(outputs, stride):
    """BN-ReLU-conv twice (Zagoruyko & Komodakis, 2016); where the width changes, both paths see the first ReLU."""
    ours, x = convolutional.PreActivation(16, outputs, "batch", stride), torch.randn(4, 16, 8, 8)
    norm1, conv1, norm2, conv2, *shortcut = (m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    seen = norm1(x).clamp(min=0)
    residual = conv2(norm2(conv1(seen)).clamp(min=0))
    assert torch.allclose(ours(x), residual + (shortcut[0](seen) if shortcut else x), atol=1e-6)
    assert len(shortcut) == (outputs != 16)


def test_the_head_of_moon_has_two_layers_before_the_classifier():
    model = models.build("lenet:projection=256", 10, "group")
    linear = [module for module in model if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (400, 120), (120, 84), (84, 84), (84, 256), (256, 10)
    ]  # fmt: skip
    assert isinstance(model[-3], nn.ReLU), "no ReLU between the head and the classifier, as in MOON's code"


def test_the_plain_cnns_are_those_of_their_papers():
    """Against the layers in their usual order."""
    images = torch.randn(4, 3, 32, 32)
    for text, padding in (("lenet", 0), ("mcmahan-cnn", 2)):
        model = models.build(text, 10, "group")
        weights = list(model.parameters())
        x = images
        for weight, bias in zip(weights[:4:2], weights[1:4:2], strict=True):
            x = F.max_pool2d(F.conv2d(x, weight, bias, padding=padding).relu(), 2)
        x = x.flatten(1)
        for weight, bias in zip(weights[4:-2:2], weights[5:-2:2], strict=True):
            x = F.linear(x, weight, bias).relu()
        assert torch.allclose(model(images), F.linear(x, *weights[-2:]), atol=1e-5)


def test_grayscale_models_read_the_mean_of_the_channels():
    gray = torch.randn(2, 1, 28, 28).expand(-1, 3, -1, -1)
    for text in ("lenet", "mcmahan-cnn"):
        model = models.build(f"{text}:pixels=28,gray=true", 10, "group")
        assert torch.allclose(model(gray), model[1:](gray[:, :1]), atol=1e-6)


def test_fedgems_and_feddfs_models_have_their_layers():
    def convolutions(text: str) -> list[tuple[int, int]]:
        modules = models.build(text, 10, "batch").modules()
        return [(m.kernel_size[0], m.out_channels) for m in modules if isinstance(m, nn.Conv2d)]

    widths = [32, 64, 128, 128, 256, 256, 256, 256]
    assert convolutions("vgg9") == [(3, width) for width in widths]
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert convolutions("vgg16") == [(3, width) for width in widths]
    for blocks, layers in (("1+1+1", 11), ("1+1+2", 14), ("1+2+2", 17), ("2+2+2", 20), ("6+6+6", 56)):
        assert len(convolutions(f"bottleneck-resnet:blocks={blocks}")) + 1 - 3 == layers, "without three shortcuts"
    for text in ("", "0+1", "1+x", "1+-1"):
        with pytest.raises((UsageError, ValueError), match=r"separated by|Cannot read"):
            models.build(f"bottleneck-resnet:blocks={text}", 10, "group")


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


@pytest.mark.parametrize("name", [name for name in CATALOG["model"] if name != "torchvision"])
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


@pytest.mark.parametrize("stride", [1, 2])
def test_a_narrow_shortcut_is_a_convolution_with_a_stride(stride):
    """Every second pixel, then a 1x1 convolution: the same function, whose backward pass is safe on every CPU."""
    narrow = convolutional._shortcut(4, 6, "batch", stride)
    strided = convolutional.convolution(4, 6, "batch", stride, kernel=1)
    assert [*narrow.state_dict()] == [*strided.state_dict()]
    strided.load_state_dict(narrow.state_dict())
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(narrow.double()(x), strided.double()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", ["resnet8:width=4", "wrn-16-2:width=3", "resnet8:width=4,norm=batch"])
def test_no_narrow_convolution_has_a_stride_and_one_pixel(model):
    for layer in models.build(model, 10, "group").modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.in_channels < 8:
            assert layer.stride == (1, 1)


def test_a_model_without_the_number_of_classes_is_named_before_a_run(tmp_path):
    (tmp_path / "net.py").write_text("class Net:\n    def __init__(self, width=3): ...\n\ndef any(**options): ...\n")
    with pytest.raises(PluginError, match="needs a parameter `classes`"):
        models.check(f"{tmp_path}/net.py:Net")
    models.check(f"{tmp_path}/net.py:any")
