"""Task: the images of a distillation, and their scaling to a network's input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fedkd.core import runtime, seeds, tensors
from fedkd.core.errors import DataError
from fedkd.data import loading, sources
from fedkd.data.readers import Images
from fedkd.training import precision

if TYPE_CHECKING:
    from fedkd.data.scaling import Scaling
    from fedkd.distill.config import DistillConfig
    from fedkd.training.precision import Precision


@dataclass(frozen=True, eq=False)
class Task:
    """The training, validation and test images of a distillation, their scaling, the device and the precision.

    ``shifted`` are the test images of another data set of the same classes, if one is given.
    """

    dataset: str
    train: Images
    validation: Images
    test: Images
    shifted: Images | None
    scaling: Scaling
    flip: bool
    device: str
    precision: Precision

    @cached_property
    def digest(self) -> str:
        """A hash of the training images and labels."""
        return tensors.digest({"pixels": self.train.pixels.cpu(), "labels": self.train.labels})

    @property
    def classes(self) -> int:
        return self.test.classes


def prepare(config: DistillConfig) -> tuple[Task, str]:
    """The task, and the reason why ``auto`` chose a data set other than CIFAR-10, if it did.

    The validation samples are the same for every seed, since teachers are cached across runs.

    Raises:
        DataError: data is missing, or the shifted set has other classes.

    """
    dataset, fallback = loading.choose_dataset(config.dataset, config.data_dir)
    source = sources.named(dataset).read_by(config)
    device = runtime.device(config.device)
    resolved = precision.resolve(config.precision, device)
    train, test = loading.splits(source, config.data_dir)
    classes = max(train.classes, test.classes)
    held_out = max(1, min(config.validation, len(train) // 10)) if config.validation else 0
    if len(train) <= held_out:
        raise DataError(f"{dataset} has {len(train)} training images; at least two are needed.")
    order = torch.randperm(len(train), generator=seeds.generator(0, "validation"))

    def selected(images: Images, indices: torch.Tensor | slice) -> Images:
        return Images(images.pixels[indices].to(device), images.labels[indices], classes, test.names)

    shifted = None
    if config.shifted:
        other = loading.read(sources.named(config.shifted).read_by(config), "test", config.data_dir)
        if other.classes != classes or other.pixels.shape[1:] != test.pixels.shape[1:]:
            raise DataError(
                f"--shifted {config.shifted} has {other.classes} classes of {other.pixels.shape[1]} pixels, "
                f"{dataset} {classes} of {test.pixels.shape[1]}; name a data set with the same."
            )
        if other.names and test.names and other.names != test.names:
            raise DataError(f"--shifted {config.shifted} has other classes than {dataset}, or another order of them.")
        shifted = selected(other, slice(None))
    assert train.scaling is not None
    everything = slice(None)
    task = Task(
        dataset,
        selected(train, order[held_out:]),
        selected(train, order[:held_out]),
        selected(test, everything),
        shifted,
        train.scaling,
        source.flip,
        device,
        resolved,
    )
    return task, fallback
