"""Data sets by name.

A `Source` describes where the images are; nothing heavy is imported before they are read.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fedkd.core import specs
from fedkd.core.errors import PluginError
from fedkd.core.options import Options
from fedkd.core.values import MAX_PIXELS, Resize

Pixels = Annotated[int, Field(ge=8, le=1024)]
SPLIT = ("split",)  # the parameter of user-defined data sets that fedkd fills in


@dataclass(frozen=True)
class Source:
    """A named data set. ``read(split, data_dir)`` decodes ``"train"`` or ``"test"``."""

    name: str
    reader: str  # a function of fedkd.data.readers
    argument: str = ""
    folder: str = ""  # its directory in the parquet layout
    pixels: int = 32  # height and width to which images are scaled
    flip: bool = True  # whether a mirrored image keeps its class
    count: int = 0
    train: int = 0  # number of training images, the first ones; 0 for all
    test: int = 0  # number of test images
    train_part: str = ""  # the name of the training part, or of EMNIST's split
    held_out: str = ""  # the name of the test part, or the fraction of the images that it gets
    image_column: str = ""
    label_column: str = ""
    client_column: str = ""  # with the client of each training sample, if they are to be known
    labeled: bool = True
    resize: Resize = "crop"
    max_pixels: int = MAX_PIXELS  # of an image that is decoded
    skip_damaged: bool = False

    def read_by(self, config: Options) -> Source:
        """The same with the options that say how images are read."""
        how = {"resize": config.resize, "max_pixels": config.max_pixels, "skip_damaged": config.skip_damaged}
        return dataclasses.replace(self, **how)  # type: ignore[arg-type]


def named(text: str) -> Source:
    """The source that a spec names. Parameters ``pixels`` and ``flip`` of a user-defined data set hold for it, too.

    Raises:
        UsageError, PluginError: there is no such source.

    """
    bound = specs.bind("dataset", text, SPLIT)
    if "split" in (parameters := inspect.signature(bound.func).parameters):
        values = {name: p.default for name, p in parameters.items() if p.default is not p.empty} | bound.keywords
        source = Source(text, "user_defined", text)
        source = dataclasses.replace(source, **{k: v for k, v in values.items() if k in ("pixels", "flip")})
        if type(source.pixels) is not int or not 8 <= source.pixels <= 1024 or not isinstance(source.flip, bool):
            raise PluginError(
                f"{text}: pixels is a side from 8 to 1024 and flip a bool, not {source.pixels} and {source.flip}."
            )
        return source
    source = specs.call("dataset", text)
    if not isinstance(source, Source):
        raise PluginError(
            f"--dataset {text} is {type(source).__name__}; a function or class that gives pairs (image, label) needs "
            "the parameter split."
        )
    return source


def cifar10(*, train: NonNegativeInt = 0, test: NonNegativeInt = 0) -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 and 10,000 images of 10 classes, or the first of them."""
    return Source("cifar10", "torchvision", "CIFAR10", "cifar10", train=train, test=test)


def cifar100(*, train: NonNegativeInt = 0, test: NonNegativeInt = 0) -> Source:
    """CIFAR-100 (Krizhevsky, 2009): 50,000 and 10,000 images of 100 classes, or the first of them."""
    return Source("cifar100", "torchvision", "CIFAR100", "cifar100", train=train, test=test)


def svhn() -> Source:
    """Street View House Numbers (Netzer et al., 2011)."""
    return Source("svhn", "torchvision", "SVHN", "svhn", flip=False)


def stl10(*, pixels: Pixels = 32) -> Source:
    """STL-10 (Coates et al., 2011), its labeled images, scaled from 96 pixels."""
    return Source("stl10", "torchvision", "STL10", "stl10", pixels=pixels)


def fashion_mnist() -> Source:
    """Fashion-MNIST (Xiao et al., 2017), converted to RGB and scaled from 28 pixels."""
    return Source("fashion-mnist", "torchvision", "FashionMNIST", "fashion_mnist")


def mnist(*, train: NonNegativeInt = 0, test: NonNegativeInt = 0, pixels: Pixels = 32) -> Source:
    """MNIST (LeCun et al., 1998): 60,000 and 10,000 digits, or the first of them, scaled from 28 pixels."""
    return Source("mnist", "torchvision", "MNIST", "mnist", flip=False, train=train, test=test, pixels=pixels)


def emnist(*, part: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced") -> Source:
    """EMNIST (Cohen et al., 2017): handwritten letters and digits, scaled from 28 pixels; ``part`` is its split."""
    return Source("emnist", "torchvision", "EMNIST", "emnist", flip=False, train_part=part)


def digits() -> Source:
    """Scikit-learn's handwritten digits: 1,797 real images of 8x8, bundled; a fifth is the test set."""
    return Source("digits", "digits", flip=False)


def hf(
    name: str,
    /,
    *,
    image: str = "",
    label: str = "",
    train: str = "",
    test: str = "",
    pixels: Pixels = 32,
    flip: bool = True,
) -> Source:
    """A table of images: a data set's name on the Hugging Face hub, or a folder or file.

    ``image`` and ``label`` are columns, ``train`` and ``test`` splits; ``test=0.2`` holds out a part of the images.
    """
    fraction_of(test)
    source = Source(f"hf:{name}", "hugging_face", name, pixels=pixels, flip=flip, train_part=train, held_out=test)
    return dataclasses.replace(source, image_column=image, label_column=label)


def folder(path: str, /, *, pixels: Pixels = 32, flip: bool = True, test: str = "") -> Source:
    """A folder with ``train/CLASS/FILE`` and ``test/CLASS/FILE`` (or val), or ``CLASS/FILE`` with ``test=0.2``."""
    fraction_of(test)
    return Source(f"folder:{path}", "folder", path, pixels=pixels, flip=flip, held_out=test)


def fraction_of(test: str) -> float | None:
    """The fraction in ``test=0.2``; None if it is the name of a part.

    Raises:
        ValueError: it is a number, but not a fraction.

    """
    try:
        fraction = float(test)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(f"test={test} is neither a name nor a fraction between 0 and 1")
    return fraction


def own(path: str, pixels: int) -> Source:
    """The data of a node in a deployment; not available on the command line."""
    return Source(f"data {path}", "own", path, pixels=pixels)


def noise(*, size: PositiveInt = 5000, pixels: Pixels = 32) -> Source:
    """Uniform noise with random labels, for measuring speed: nothing can be learned from it."""
    return Source("noise", "noise", count=size, pixels=pixels)
