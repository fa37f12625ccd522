"""The models by name. Each function returns a fresh module; PyTorch is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from fedkd import specs
from fedkd.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["group", "batch"]


def cnn(*, classes: int, norm: Norm = "group", width: PositiveInt = 32) -> nn.Module:
    """Three convolutions (width, 2 width, 2 width), 66,730 parameters for 10 classes."""
    from fedkd.models.convolutional import cnn as build

    return build(classes, norm, width)


def resnet8(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with one block a stage (He et al., 2016), 78,042 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(1, classes, norm, width)


def resnet20(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with three blocks a stage (He et al., 2016), 272,474 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(3, classes, norm, width)


def torchvision(name: str, /, *, classes: int) -> nn.Module:
    """A classifier of torchvision.models, untrained, with its own normalization layers."""
    import torchvision as library

    from fedkd.errors import unknown

    known = library.models.list_models(module=library.models)
    if name not in known:
        raise UsageError(unknown("model of torchvision", name, known))
    model: nn.Module = library.models.get_model(name, weights=None, num_classes=classes)
    return model


RESERVED = ("classes",)


def split(text: str) -> list[str]:
    """The specs in a comma list: ``cnn,resnet8:norm=batch,width=8`` names two models."""
    specs_: list[str] = []
    for item in text.split(","):
        continues = "=" in item and ":" not in item.partition("=")[0]
        if continues and specs_:
            specs_[-1] += f",{item}"
        else:
            specs_.append(item.strip())
    return specs_


def build(text: str, classes: int, norm: Norm) -> nn.Module:
    """A fresh module for a spec; ``norm`` holds where the spec names none."""
    bound = specs.bind("model", text, RESERVED)
    if bound.func in (cnn, resnet8, resnet20):
        bound.keywords.setdefault("norm", norm)
    module: nn.Module = bound(classes=classes)
    return module
