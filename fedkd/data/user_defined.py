"""Data sets of the user's own: a function or class with the parameter ``split`` that gives pairs (image, label)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from fedkd.core import specs
from fedkd.core.errors import PluginError
from fedkd.core.lazy import torch
from fedkd.data import pictures
from fedkd.data.samples import Samples, array
from fedkd.data.sources import SPLIT

if TYPE_CHECKING:
    from fedkd.data.samples import Picture
    from fedkd.data.sources import Source


def samples(source: Source, split: str) -> Samples:
    """All samples of a split. Open images and arrays are scaled at once, so that they take little memory.

    Raises:
        PluginError: the data set raises, or breaks its contract.

    """
    option = "dataset" if source.labeled else "proxy"
    name = f"--{option} {source.argument} ({split})"
    items: list[Picture] = []
    labels: list[int | str] = []
    with specs.attributing([(option, source.argument)], f"for split={split!r}"):
        data = specs.bind("dataset", source.argument, SPLIT)(split=split)
        classes = getattr(data, "classes", None)
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise PluginError(f"{name} gives {type(data).__name__}, which has no length and items; return a list.")
        count = len(data)
    for index in range(count):
        where = f"{name}: item {index}"
        with specs.attributing([(option, source.argument)], f"at item {index} for split={split!r}"):
            item = data[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            image, label = item
        elif source.labeled:
            raise PluginError(f"{where} is {type(item).__name__}, not a pair (image, label).")
        else:
            image, label = item, -1
        items.append(_picture(image, source, where))
        labels.append(_label(label, where) if source.labeled else -1)
    if not items:
        raise PluginError(f"{name} has no items.")
    if not source.labeled:
        return Samples.of(source.name, items, [-1] * count)
    return Samples.of(source.name, items, *_numbered(labels, classes, name))


def _picture(image: Any, source: Source, where: str) -> Picture:
    """The image as it is decoded later; an open one is scaled now."""
    if isinstance(image, Path | str):
        return Path(image).expanduser()
    if isinstance(image, bytes):
        return image
    if isinstance(image, PIL.Image.Image):
        try:
            return pictures.pixels(image, source.pixels, source.resize)
        except pictures.BadPicture as problem:
            return problem
        except Exception as error:  # it was opened, but not decoded until now
            return pictures.Damaged(f"is damaged ({type(error).__name__}: {error})")
    if isinstance(image, torch.Tensor):
        channels_first = image.ndim == 3 and len(image) in (1, 3)
        image = (image.permute(1, 2, 0) if channels_first else image).numpy()
    if not isinstance(image, np.ndarray):
        kinds = "a PIL image, an encoded image in bytes, a path, or an array"
        raise PluginError(f"{where} has an image of type {type(image).__name__}, not {kinds}.")
    if isinstance(values := array(image), pictures.BadPicture):
        raise PluginError(f"{where} has an image that {values}; leave out transforms that make floats.")
    return pictures.pixels(PIL.Image.fromarray(values), source.pixels, source.resize)


def _label(label: Any, where: str) -> int | str:
    if isinstance(label, str):
        return str(label)
    try:
        return operator.index(label)
    except TypeError as error:
        raise PluginError(f"{where} has a label of type {type(label).__name__}, not an int or str.") from error


def _numbered(labels: Sequence[int | str], classes: Any, name: str) -> tuple[list[int], tuple[str, ...]]:
    """The numbers of the labels, and the names of the classes; without names, text is sorted."""
    if classes is not None and not all(isinstance(each, str) for each in classes):
        raise PluginError(f"{name}: its attribute classes is no list of names.")
    if classes is None and all(isinstance(label, str) for label in labels):
        classes = sorted(set(labels))
    names = tuple(classes or ())
    known = {each: number for number, each in enumerate(names)}
    numbers = [known.get(label, -1) if isinstance(label, str) else label for label in labels]
    for index, number in enumerate(numbers):
        if number < 0 or (names and number >= len(names)):
            classes = f"the {len(names)} classes {', '.join(names[:10])}" if names else "class numbers from 0"
            raise PluginError(f"{name}: item {index} has the label {labels[index]!r}, which is none of {classes}.")
    return numbers, names
