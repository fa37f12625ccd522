"""Checkpoints: a student in one file with everything that is needed to use it. Other weights are read here too."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fedkd.core import seeds, specs, tensors
from fedkd.core.brief import brief
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import DataError, PluginError, UsageError
from fedkd.core.values import Resize
from fedkd.data.scaling import Scaling
from fedkd.training import models

if TYPE_CHECKING:
    from torch import nn

    from fedkd.core.tensors import Tensors

KEY = "fedkd"  # of the JSON in the file's metadata


@dataclass(frozen=True, eq=False)
class Student:
    """A trained classifier of square images: model, weights, classes, and the scaling of its input.

    ``names`` are the names of the classes, if the data has any; ``dataset`` is the data set it was trained on.
    ``resize`` is how its images were made square. ``held_out`` is the number of training images that `fedkd.distill`
    held out for validation (0: unknown).
    """

    __repr__ = brief

    model: str
    norm: models.Norm
    classes: int
    names: tuple[str, ...]
    pixels: int
    scaling: Scaling
    dataset: str
    weights: Tensors
    resize: Resize
    held_out: int = 0

    def module(self) -> nn.Module:
        """The network [B, 3, H, W] -> logits [B, C], in evaluation mode on the CPU.

        Raises:
            DataError: there is no such model, or the weights do not fit it.

        """
        import torch

        try:
            if specs.parse(self.model).name in CATALOG["model"]:  # user-defined ones are not named by the file
                self._check_size()
            module = models.build(self.model, self.classes, self.norm).to(memory_format=torch.channels_last)
        except (DataError, PluginError):
            raise
        except Exception as error:  # anything that a model raises for the options in a file
            raise DataError(
                f"The model in the file cannot be built, {self.model}: {str(error).rstrip('.')}."
            ) from error
        fill(module, self.weights, self._whose)
        return module.eval()

    @property
    def _whose(self) -> str:
        return f"the weights of this {self.model}"

    def _check_size(self) -> None:
        """Compare the model with the weights before memory is allocated: a file may name a model of any size.

        Raises:
            DataError: names or shapes differ, or the model is larger.

        """
        import torch
        from torch.nn.modules.module import register_module_parameter_registration_hook

        count = tensors.numel(self.weights)
        larger = DataError(f"{_capitalized(self._whose)} do not fit it: it has more than these {count:,} parameters.")
        left = 2 * count  # a model may replace some layers while it is built

        def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
            nonlocal left
            left -= parameter.numel()
            if left < 0:
                raise larger

        if self.classes > count:
            raise larger
        hook = register_module_parameter_registration_hook(registered)
        try:
            with torch.device("meta"):
                module = models.build(self.model, self.classes, self.norm)
        except NotImplementedError:  # RegNets compute on tensors while they are built; their size has no options
            return
        finally:
            hook.remove()
        check_fit(module, self.weights, self._whose)

    def about(self) -> dict[str, Any]:
        """Everything except the weights, as JSON values."""
        return {
            "model": self.model,
            "norm": self.norm,
            "classes": self.classes,
            "names": list(self.names),
            "pixels": self.pixels,
            "mean": list(self.scaling.mean),
            "std": list(self.scaling.std),
            "dataset": self.dataset,
            "resize": self.resize,
            "held_out": self.held_out,
        }

    def save(self, path: Path) -> None:
        """Write one safetensors file atomically."""
        tensors.save(self.weights, path, {KEY: json.dumps(self.about())})


def load(path: Path | str, model: str = "") -> Student:
    """The student in a file, or in ``student.safetensors`` of a run directory.

    Code that a file names is not imported: a user-defined model must be given by ``model``.

    Raises:
        DataError: the file does not exist, cannot be read, or does not describe its model.

    """
    path = Path(path)
    path = path / "student.safetensors" if path.is_dir() else path
    weights, metadata = _read_safetensors(path)
    try:
        about = json.loads(metadata[KEY])
        mean, std = (tuple(float(value) for value in about[key]) for key in ("mean", "std"))
        named = _text(about["model"])
        is_user_defined = specs.parse(named).is_plugin
        student = Student(
            model or named,
            "batch" if about["norm"] == "batch" else "group",
            int(about["classes"]),
            tuple(map(_text, about["names"])),
            int(about["pixels"]),
            Scaling((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])),
            _text(about["dataset"]),
            weights,
            _resize(about.get("resize", "stretch")),  # files without it are older, and were trained so
            int(about.get("held_out", 0)),
        )
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError, UsageError) as error:
        raise DataError(
            f"{path} holds weights without a description of their model: it was not written by fedkd."
        ) from error
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise DataError(f"{path} cannot be used: the scaling of its input is not finite, or has a deviation of zero.")
    if not model and is_user_defined:
        raise DataError(
            f"{path} has a user-defined model; give it by --model {named} (in Python: model=), which runs its code."
        )
    return student


def _resize(value: Any) -> Resize:
    if value not in get_args(Resize):
        raise ValueError(f"{value!r} is no way to make an image square")
    return value  # type: ignore[no-any-return]


def _text(value: object) -> str:
    """A value as text that can be printed and written."""
    return str(value).encode(errors="replace").decode()


def read_weights(path: Path) -> Tensors:
    """Named tensors from a safetensors file, or from a state dict as ``torch.save`` writes it.

    From the latter only tensors and containers are read; anything else is refused, and no code is run.

    Raises:
        DataError: there is no such file, it is damaged, or it holds something else.

    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    import torch

    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, RuntimeError and UnpicklingError among them
        raise DataError(
            f"{path} is damaged or holds more than tensors, which is refused; save a state dict or safetensors."
        ) from error
    for key in ("state_dict", "model"):  # as training scripts nest it
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if (
        not isinstance(contents, dict)
        or not contents
        or not all(isinstance(value, torch.Tensor) for value in contents.values())
    ):
        raise DataError(f"{path} holds no state dict (names and tensors).")
    return {str(name).removeprefix("module."): tensor.detach() for name, tensor in contents.items()}


def initial(model: str, classes: int, norm: models.Norm, seed: int, *path: int) -> tuple[nn.Module, str]:
    """A new module with the weights of its ``pretrained`` file, else random ones, the same for the same seed and path.

    If the file is of another number of classes, its last layer is random too; then a sentence that says so, else "".

    Raises:
        DataError: the file cannot be read, or does not fit the model.

    """
    spec, file = models.pretrained(model)
    with seeds.seeded(seeds.derive(seed, "initial", spec, *path)):
        module = models.build(spec, classes, norm)
    if file is None:
        return module, ""
    own, weights, note = module.state_dict(), dict(read_weights(file)), ""
    if hasattr(module, "aux_logits"):  # torchvision's files of such networks have more classifiers
        weights = {n: t for n, t in weights.items() if not n.startswith(("aux1.", "aux2.", "AuxLogits."))}
    other = [name for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape]
    is_last_layer = len({name.rpartition(".")[0] for name in other}) == 1 and all(
        (weights[name].ndim, *weights[name].shape[1:]) == (own[name].ndim, *own[name].shape[1:])
        and own[name].shape[:1] == (classes,)
        for name in other
    )
    if is_last_layer:
        layer, count = other[0].rpartition(".")[0], len(weights[other[0]])
        note = f"{file} has {count} classes, not {classes}, so the last layer ({layer}) starts with random weights."
        weights |= {name: own[name] for name in other}
    try:
        fill(module, weights, f"the weights in {file}")
    except DataError as error:
        raise DataError(f"{error} Name the model that they were saved from; here it is {spec}.") from error
    return module, note


def other_classes(model: str, names: Sequence[str]) -> str:
    """A sentence if the pretrained file is of a student with as many, but other classes; else ""."""
    file = models.pretrained(model)[1]
    if file is None or file.suffix != ".safetensors" or not names:
        return ""
    try:
        own = [_text(name) for name in json.loads(_read_safetensors(file)[1][KEY])["names"]]
    except (KeyError, ValueError, TypeError):  # it was not written by fedkd
        return ""
    is_other = len(own) == len(names) and own != list(names)
    return f"{file} is of other classes ({', '.join(own[:5])}); its last layer is kept." if is_other else ""


def fill(module: nn.Module, weights: Tensors, whose: str) -> None:
    """Load weights into a module.

    Raises:
        DataError: names, shapes or types are not the module's, or values are not finite.

    """
    check_fit(module, weights, whose)
    for name, tensor in weights.items():
        if not tensor.double().isfinite().all():
            raise DataError(f"{_capitalized(whose)} cannot be used: {name} has values that are not finite.")
    module.load_state_dict(dict(weights))


def check_fit(module: nn.Module, weights: Tensors, whose: str) -> None:
    """Compare weights with a module, which may be on the device ``meta``.

    Raises:
        DataError: names, shapes or types are not the module's.

    """
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for text, names in (("lack", missing), ("hold an unknown", foreign)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{_capitalized(whose)} do not fit it: they {text} {names[0]}{more}.")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            raise DataError(f"{_capitalized(whose)} do not fit it: {name} is {shapes}.")
        if weights[name].is_complex() or (tensor.is_floating_point() and not weights[name].is_floating_point()):
            raise DataError(f"{_capitalized(whose)} do not fit it: {name} has the type {weights[name].dtype}.")


def _capitalized(text: str) -> str:
    """The text with a capital letter; the others are left alone, as they may be those of a path."""
    return text[:1].upper() + text[1:]


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a file and its metadata."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        return tensors.read(path)
    except Exception as error:  # SafetensorError, or another error for damaged bytes
        raise DataError(f"{path} is not a safetensors file, or is damaged.") from error
