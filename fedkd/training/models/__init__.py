"""Models by name. Each function returns a new module; PyTorch is imported at the first call."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fedkd.core import quotes, specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import DataError, PluginError, UsageError

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["group", "batch"]


def cnn(*, classes: int, norm: Norm = "group", width: PositiveInt = 32) -> nn.Module:
    """Three convolutions (width, 2 width, 2 width), 66,730 parameters for 10 classes."""
    from fedkd.training.models.convolutional import cnn as build

    return build(classes, norm, width)


def resnet8(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with one block per stage (He et al., 2016), 78,042 parameters."""
    return _cifar_resnet(1, classes, norm, width)


def resnet20(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with three blocks per stage (He et al., 2016), 272,474 parameters."""
    return _cifar_resnet(3, classes, norm, width)


def resnet32(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with five blocks per stage (He et al., 2016), 466,906 parameters."""
    return _cifar_resnet(5, classes, norm, width)


def resnet56(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with nine blocks per stage (He et al., 2016), 855,770 parameters."""
    return _cifar_resnet(9, classes, norm, width)


def resnet110(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The CIFAR ResNet with 18 blocks per stage (He et al., 2016), 1,730,714 parameters."""
    return _cifar_resnet(18, classes, norm, width)


def resnet8x4(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """RepDistiller's resnet8x4: resnet8 with stages four times as wide (Tian et al., 2020), 1,210,410 parameters."""
    return _cifar_resnet(1, classes, norm, 4 * width, stem=2 * width)


def resnet32x4(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """RepDistiller's resnet32x4: resnet32, four times as wide (Tian et al., 2020), 7,410,730 parameters."""
    return _cifar_resnet(5, classes, norm, 4 * width, stem=2 * width)


def wrn_16_2(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The wide ResNet of 16 layers, twice as wide (Zagoruyko & Komodakis, 2016), 691,674 parameters."""
    return _wide_resnet(2, classes, norm, 2 * width, stem=width)


def wrn_40_1(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The wide ResNet of 40 layers, of ordinary width (Zagoruyko & Komodakis, 2016), 563,930 parameters."""
    return _wide_resnet(6, classes, norm, width, stem=width)


def wrn_40_2(*, classes: int, norm: Norm = "group", width: PositiveInt = 16) -> nn.Module:
    """The wide ResNet of 40 layers, twice as wide (Zagoruyko & Komodakis, 2016), 2,243,546 parameters."""
    return _wide_resnet(6, classes, norm, 2 * width, stem=width)


def bottleneck_resnet(
    *, classes: int, norm: Norm = "group", width: PositiveInt = 16, blocks: str = "1+1+1"
) -> nn.Module:
    """A CIFAR ResNet of bottleneck blocks, as of FedGEMS (Cheng et al., 2021): ResNet-11, 127,642 parameters."""
    from fedkd.training.models.convolutional import Bottleneck, ResNet

    counts = blocks.split("+")
    if not all(count.isdecimal() and 0 < int(count) < 100 for count in counts) or len(counts) > 6:
        raise ValueError("blocks are the numbers of blocks in up to six stages, from 1 to 99, separated by +")
    widths = [width * 2**i for i in range(len(counts))]
    return ResNet(list(map(int, counts)), widths, classes, norm, block=Bottleneck)


def resnet18(*, classes: int, norm: Norm = "group", width: PositiveInt = 64) -> nn.Module:
    """ResNet-18 (He et al., 2016) for 32 pixels: a 3x3 first convolution, no first pooling, 11,173,962 parameters."""
    from fedkd.training.models.convolutional import ResNet

    return ResNet((2, 2, 2, 2), (width, 2 * width, 4 * width, 8 * width), classes, norm)


def vgg8(*, classes: int, norm: Norm = "group", width: PositiveInt = 64) -> nn.Module:
    """RepDistiller's vgg8, one convolution per stage (Tian et al., 2020), 3,918,858 parameters."""
    return _vgg(1, classes, norm, width)


def vgg13(*, classes: int, norm: Norm = "group", width: PositiveInt = 64) -> nn.Module:
    """RepDistiller's vgg13, two convolutions per stage (Tian et al., 2020), 9,416,010 parameters."""
    return _vgg(2, classes, norm, width)


def vgg16(*, classes: int, norm: Norm = "group", width: PositiveInt = 64) -> nn.Module:
    """CFD's VGG-16 for 32 pixels, two hidden layers of 512 (Sattler et al., 2020), 15,253,578 parameters."""
    from fedkd.training.models.convolutional import vgg

    stages = ([width] * 2, [2 * width] * 2, [4 * width] * 3, [8 * width] * 3, [8 * width] * 3)
    return vgg(stages, classes, norm, pools=5, hidden=[8 * width] * 2)


def vgg9(*, classes: int, width: PositiveInt = 32) -> nn.Module:
    """FedDF's VGG-9 without normalization layers (Lin et al., 2020), 2,308,810 parameters."""
    from fedkd.training.models.convolutional import vgg

    stages = ([width], [2 * width], [4 * width] * 2, [8 * width] * 2, [8 * width] * 2)
    return vgg(stages, classes, "", pools=5)


def mobilenetv2(
    *,
    classes: int,
    norm: Norm = "group",
    width: Annotated[float, Field(gt=0, le=16)] = 1.0,
    stride: Annotated[int, Field(ge=1, le=2)] = 2,
) -> nn.Module:
    """MobileNetV2 (Sandler et al., 2018) for 32 pixels, 2,237,770 parameters; RepDistiller's has ``width=0.5``."""
    from fedkd.training.models.convolutional import mobilenetv2 as build

    return build(classes, norm, width, stride)


def lenet(*, classes: int, projection: NonNegativeInt = 0, pixels: PositiveInt = 32, gray: bool = False) -> nn.Module:
    """The CNN of MOON (Li et al., 2021) and NIID-Bench, 62,006 parameters; ``projection=256`` adds MOON's head."""
    from fedkd.training.models.convolutional import two_convolutions

    return two_convolutions((6, 16), (120, 84), classes, pixels=pixels, padding=0, gray=gray, projection=projection)


def mcmahan_cnn(*, classes: int, pixels: PositiveInt = 32, gray: bool = False) -> nn.Module:
    """The CNN of FedAvg (McMahan et al., 2017), 2,156,490 parameters; 1,663,370 with ``pixels=28,gray=true``."""
    from fedkd.training.models.convolutional import two_convolutions

    return two_convolutions((32, 64), (512,), classes, pixels=pixels, padding=2, gray=gray, projection=0)


def _cifar_resnet(blocks: int, classes: int, norm: Norm, width: int, stem: int = 0) -> nn.Module:
    """The 6n + 2 layer ResNet: three stages of n blocks, widths w, 2w, 4w."""
    from fedkd.training.models.convolutional import ResNet

    return ResNet([blocks] * 3, (width, 2 * width, 4 * width), classes, norm, stem=stem)


def _wide_resnet(blocks: int, classes: int, norm: Norm, width: int, stem: int) -> nn.Module:
    """The 6n + 4 layer wide ResNet: three stages of n blocks, widths w, 2w, 4w."""
    from fedkd.training.models.convolutional import PreActivation, ResNet

    return ResNet([blocks] * 3, (width, 2 * width, 4 * width), classes, norm, stem=stem, block=PreActivation)


def _vgg(convolutions: int, classes: int, norm: Norm, width: int) -> nn.Module:
    """RepDistiller's VGG: five stages of as many convolutions, pooling after the first three."""
    from fedkd.training.models.convolutional import vgg

    return vgg([[width * n] * convolutions for n in (1, 2, 4, 8, 8)], classes, norm, pools=3)


def vit_tiny(*, classes: int, patch: PositiveInt = 4, width: PositiveInt = 96, depth: PositiveInt = 4) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al., 2021): patches of 4x4, 4 blocks of 96, 453,226 parameters."""
    from fedkd.training.models.sequential import ViT

    return ViT(classes, patch, width, depth)


def row_gru(*, classes: int, width: PositiveInt = 128) -> nn.Module:
    """A recurrent network (GRU: Cho et al., 2014) that reads an image row by row, 176,138 parameters."""
    from fedkd.training.models.sequential import RowGRU

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
    parameters = inspect.signature(specs.bind("model", spec, RESERVED).func).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if specs.parse(spec).is_plugin and "classes" not in parameters and not takes_any:
        raise PluginError(f"model {text!r} needs a parameter `classes`, the number of classes, which fedkd gives it.")
    if file is not None and not file.is_file():
        raise DataError(f"{text}: there is no file {file}.")


def digests(texts: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each file of pretrained weights that these models have, by its path."""
    found = {}
    for file in sorted({file for text in texts if (file := pretrained(text)[1])}):
        with file.open("rb") as opened:
            found[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def has_norm(text: str) -> bool:
    """Whether it is a built-in model with a choice of normalization layers."""
    return is_built_in(text) and specs.has_option("model", text, "norm")


def is_built_in(text: str) -> bool:
    """Whether it is a model of fedkd."""
    return specs.parse(text).name in CATALOG["model"]


def build(text: str, classes: int, norm: Norm) -> nn.Module:
    """A new module for a spec, without pretrained weights; ``norm`` applies if the spec does not give one.

    Raises:
        UsageError, PluginError: there is no such model, or it cannot be built, or it is not a whole one.

    """
    from torch import nn
    from torch.nn.parameter import is_lazy

    bound = specs.bind("model", pretrained(text)[0], RESERVED)
    if has_norm(text):
        bound.keywords.setdefault("norm", norm)
    try:
        module: nn.Module = bound(classes=classes)
    except ValueError as error:
        if is_built_in(text):
            raise UsageError(f"model {text!r} cannot be used: {error}.") from error
        raise
    if not isinstance(module, nn.Module):
        raise PluginError(f"model {text!r} is {type(module).__name__}, not a torch.nn.Module.")
    if lazy := [name for name, tensor in module.named_parameters() if is_lazy(tensor)]:
        raise PluginError(f"model {text!r} has no shape for {lazy[0]}; give its layer the number of inputs.")
    return module
