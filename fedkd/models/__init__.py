"""Models by name. Each function returns a new module; PyTorch is imported at the first call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from fedkd.core import quotes, specs
from fedkd.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["group", "batch"]


def cnn(*, classes: int, norm: Norm = "group", width: PositiveInt = 32) -> nn.Module:
    """Three convolutions (width, 2 width, 2 width), 66,730 parameters for 10 classes."""
    from fedkd.models.convolutional import cnn as build

    return build(classes, norm, width)


def resnet8(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with one block per stage (He et al., 2016), 78,042 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(1, classes, norm, width)


def resnet20(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with three blocks per stage (He et al., 2016), 272,474 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(3, classes, norm, width)


def resnet32(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with five blocks per stage (He et al., 2016), 466,906 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(5, classes, norm, width)


def resnet56(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with nine blocks per stage (He et al., 2016), 855,770 parameters."""
    from fedkd.models.convolutional import ResNet

    return ResNet(9, classes, norm, width)


def vit_tiny(*, classes: int, patch: PositiveInt = 4, width: PositiveInt = 96, depth: PositiveInt = 4) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al., 2021): patches of 4x4, 4 blocks of 96, 453,226 parameters."""
    from fedkd.models.sequential import ViT

    return ViT(classes, patch, width, depth)


def row_gru(*, classes: int, width: PositiveInt = 128) -> nn.Module:
    """A recurrent network (GRU: Cho et al., 2014) that reads an image row by row, 176,138 parameters."""
    from fedkd.models.sequential import RowGRU

    return RowGRU(classes, width)


def torchvision(name: str, /, *, classes: int) -> nn.Module:
    """A classifier of torchvision.models, untrained, with its own normalization layers, without auxiliary outputs."""
    import torchvision as library

    from fedkd.core.errors import unknown

    known = library.models.list_models(module=library.models)
    if name not in known:
        raise UsageError(unknown("model of torchvision", name, known))
    has_auxiliary = name in ("googlenet", "inception_v3")  # in training they would return a tuple
    options = {"aux_logits": False, "init_weights": True} if has_auxiliary else {}
    model: nn.Module = library.models.get_model(name, weights=None, num_classes=classes, **options)
    return model


RESERVED = ("classes",)


def split(text: str) -> list[str]:
    """The specs in a comma list: ``cnn,resnet8:norm=batch,width=8`` names two models, also without the colon."""
    specs_: list[str] = []
    for item in quotes.split(text, ","):
        key, *value = quotes.split(item, "=", 1)
        if value and ":" not in key and specs_:
            begins = len(quotes.split(specs_[-1], ":")) == 1  # cnn,width=8
            specs_[-1] += f"{':' if begins else ','}{item.strip()}"
        else:
            specs_.append(item.strip())
    return specs_


def pretrained(text: str) -> tuple[str, Path | None]:
    """A model's spec without the option ``pretrained=FILE``, and the file (None: initial weights follow from the seed).

    A user-defined model that has an option of this name keeps it.

    Raises:
        UsageError, PluginError: there is no such model, or no file is given.

    """
    spec, value = specs.without(text, "pretrained")
    if value is None or specs.has_option("model", spec, "pretrained"):
        return text, None
    if not value:
        raise UsageError(f"{text}: pretrained= has no file.")
    return spec, Path(value).expanduser()


def check(text: str) -> None:
    """Resolve a model's name, options and file of pretrained weights; nothing heavy is imported.

    Raises:
        UsageError, PluginError: as `specs.bind`.
        DataError: there is no such file.

    """
    spec, file = pretrained(text)
    specs.bind("model", spec, RESERVED)
    if file is not None and not file.is_file():
        raise DataError(f"{text}: there is no file {file}.")


def digests(texts: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each file of pretrained weights that these models have, by its path."""
    found = {}
    for file in sorted({file for text in texts if (file := pretrained(text)[1])}):
        with file.open("rb") as opened:
            found[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def build(text: str, classes: int, norm: Norm) -> nn.Module:
    """A new module for a spec, without pretrained weights; ``norm`` applies if the spec does not give one."""
    bound = specs.bind("model", pretrained(text)[0], RESERVED)
    if bound.func in (cnn, resnet8, resnet20, resnet32, resnet56):
        bound.keywords.setdefault("norm", norm)
    module: nn.Module = bound(classes=classes)
    return module
