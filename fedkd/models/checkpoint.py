"""Student: a network in a file of its own, with all that is needed to use it. Foreign weights are read here too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd import models
from fedkd.core import specs, tensors
from fedkd.core.errors import DataError, FedkdError
from fedkd.data.scaling import Scaling

if TYPE_CHECKING:
    from torch import nn

    from fedkd.core.tensors import Tensors

KEY = "fedkd"  # of the JSON among the file's metadata


@dataclass(frozen=True, eq=False)
class Student:
    """A trained classifier of square images: its spec, its weights, its classes, how pixels become its input.

    ``names`` are those of the classes, where the data has any; ``dataset`` is what it was trained for, ``held_out``
    how many of its training images took no part, of those that `fedkd.distill` chooses by (0: not known).
    """

    model: str
    norm: models.Norm
    classes: int
    names: tuple[str, ...]
    pixels: int
    scaling: Scaling
    dataset: str
    weights: Tensors
    held_out: int = 0

    def module(self) -> nn.Module:
        """The network [B, 3, H, W] -> logits [B, C], in evaluation mode on the CPU.

        Raises:
            DataError: there is no such model, or the weights are not its.

        """
        import torch

        try:
            module = models.build(self.model, self.classes, self.norm).to(memory_format=torch.channels_last)
        except FedkdError:
            raise
        except Exception as error:  # whatever a network makes of options that a file names
            raise DataError(f"No network can be built as the file says, {self.model}: {error}.") from error
        fill(module, self.weights, f"the weights of this {self.model}")
        return module.eval()

    def about(self) -> dict[str, Any]:
        """Everything but the weights, as JSON can hold it."""
        return {
            "model": self.model,
            "norm": self.norm,
            "classes": self.classes,
            "names": list(self.names),
            "pixels": self.pixels,
            "mean": list(self.scaling.mean),
            "std": list(self.scaling.std),
            "dataset": self.dataset,
            "held_out": self.held_out,
        }

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors.save(self.weights, path, {KEY: json.dumps(self.about())})


def load(path: Path, model: str = "") -> Student:
    """The student in a file, or in ``student.safetensors`` of a run's directory.

    Nothing named in a file is imported: a model of somebody's own must be named by ``model``.

    Raises:
        DataError: there is none, it cannot be read, or it does not say what it is.

    """
    path = path / "student.safetensors" if path.is_dir() else path
    weights, held = _read_safetensors(path)
    try:
        about = json.loads(held[KEY])
        mean, std = (tuple(float(value) for value in about[key]) for key in ("mean", "std"))
        named = str(about["model"])
        student = Student(
            model or named,
            "batch" if about["norm"] == "batch" else "group",
            int(about["classes"]),
            tuple(map(str, about["names"])),
            int(about["pixels"]),
            Scaling((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])),
            str(about["dataset"]),
            weights,
            int(about.get("held_out", 0)),
        )
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} holds weights, but does not say whose: it was not written by fedkd.") from error
    if not model and specs.parse(named).is_plugin:
        raise DataError(f"{path} names a model of somebody's own, {named}; name it yourself to have its code run.")
    return student


def read_weights(path: Path) -> Tensors:
    """Named tensors from a safetensors file, or from a state dict as ``torch.save`` writes it.

    Of the latter only tensors and containers are made; whatever else it asks for is refused, and nothing is run.

    Raises:
        DataError: there is no such file, it is damaged, or it holds something else.

    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    import torch

    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises what it likes, RuntimeError and UnpicklingError among them
        raise DataError(
            f"{path} is damaged, or holds more than tensors, which is not read; save a state dict, or safetensors."
        ) from error
    for key in ("state_dict", "model"):  # how training scripts nest it
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    if not isinstance(held, dict) or not held or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise DataError(f"{path} holds no state dict (names and tensors).")
    return {str(name).removeprefix("module."): tensor.detach() for name, tensor in held.items()}


def fill(module: nn.Module, weights: Tensors, whose: str) -> None:
    """Load weights into a module.

    Raises:
        DataError: names or shapes are not the module's, or values are not finite.

    """
    own = module.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for text, names in (("lack", missing), ("hold an unknown", foreign)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{whose.capitalize()} do not fit it: they {text} {names[0]}{more}.")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            raise DataError(f"{whose.capitalize()} do not fit it: {name} is {shapes}.")
        if not weights[name].isfinite().all():
            raise DataError(f"{whose.capitalize()} cannot be used: {name} has values that are not finite.")
    module.load_state_dict(dict(weights))


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a file and what else it says."""
    from safetensors import safe_open

    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FedkdError:
        raise
    except Exception as error:  # SafetensorError, or whatever damaged bytes lead to
        raise DataError(f"{path} is no safetensors file, or a damaged one.") from error
