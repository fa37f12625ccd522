"""The outputs of a network's layers, by name: recorded by forward hooks, and listed with their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedkd.core.errors import UsageError, unknown
from fedkd.training.models.convolutional import ResNet

EMBEDDING = "embedding"  # the name of the input of the last linear layer, which counts as a layer


class Outputs(NamedTuple):
    """The logits [B, C] of a network and the outputs [B, ...] of its watched layers."""

    logits: Tensor
    layers: Mapping[str, Tensor]


class WatchedModel(nn.Module):
    """A network that returns its logits and the outputs of named layers."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, x: Tensor) -> Outputs:
        """Both; of a layer that is called several times, the last output."""
        with layer_outputs(self.model, self.names) as outputs:
            return Outputs(self.model(x), outputs)


class WithTeachers(nn.Module):
    """A network with frozen teachers: returns its output for a batch, and a list of theirs."""

    def __init__(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student = student
        # In a tuple, so that they are not submodules: not trained, not put into training mode.
        self.teachers = tuple(teachers)

    def forward(self, x: Tensor) -> tuple[Any, list[Any]]:
        """Both."""
        with torch.no_grad():
            outputs = [teacher(x) for teacher in self.teachers]
        return self.student(x), outputs


class Pair(nn.Module):
    """Two networks that are trained on the same batches: returns the logits [B, 2, C] of both."""

    def __init__(self, student: nn.Module, mentor: nn.Module) -> None:
        super().__init__()
        self.student, self.mentor = student, mentor

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return torch.stack([self.student(x), self.mentor(x)], 1)


class Extractor(nn.Module):
    """The layers of a model up to its first ReLU: returns feature maps [B, H, W, D], as images are stored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The feature maps of images [B, 3, H, W]."""
        return _halves(self.model)[0](x).movedim(1, -1)


class Tail(nn.Module):
    """The layers of a model after its `Extractor`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, maps: Tensor) -> Tensor:
        """The logits [B, C] for feature maps [B, D, H, W]."""
        return _halves(self.model)[1](maps)


def extractor_layers(model: nn.Module) -> list[str]:
    """The names of the layers of a model's `Extractor`.

    Raises:
        ValueError: it is not known where such a model can be split.

    """
    if isinstance(model, ResNet):
        return ["stem"]
    is_relu = [isinstance(layer, nn.ReLU) for layer in model] if isinstance(model, nn.Sequential) else []
    if not any(is_relu):
        raise ValueError("it is neither one of fedkd's ResNets nor a sequence of layers with a ReLU")
    return list(model._modules)[: is_relu.index(True) + 1]


def _halves(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if isinstance(model, ResNet):
        return model.extract, model.classify
    assert isinstance(model, nn.Sequential)
    count = len(extractor_layers(model))
    return partial(_applied, list(model)[:count]), partial(_applied, list(model)[count:])


def _applied(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def channels_first(maps: Tensor) -> Tensor:
    """Stored feature maps [B, H, W, D] as a `Tail` takes them."""
    return maps.movedim(-1, 1)


@contextmanager
def layer_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of these layers while the block runs, in the order in which the layers finish.

    Raises:
        ValueError: the embedding of a model without a linear layer.

    """
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def record(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor):
            outputs.pop(name, None)  # the order is that of the last call
            outputs[name] = tensor.clone()  # the next layer may work in place

    with ExitStack() as stack:
        for name in names:
            if name == EMBEDDING:
                linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
                if not linear:
                    raise ValueError("it has no linear layer, whose input would be the embedding")
                hook = linear[-1].register_forward_pre_hook(lambda _, inputs: record(EMBEDDING, inputs[0]))
            else:
                hook = modules[name].register_forward_hook(lambda _, __, output, name=name: record(name, output))
            stack.callback(hook.remove)
        yield outputs


def shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's output for a batch ``x``, without the batch dimension, in the order of computation."""
    names = [name for name, _ in model.named_modules() if name]
    if any(isinstance(module, nn.Linear) for module in model.modules()):
        names.append(EMBEDDING)
    was_training, device = model.training, next(model.parameters()).device
    with layer_outputs(model.eval(), names) as outputs, torch.no_grad():
        model(x.to(device))
    model.train(was_training)
    return {name: tuple(output.shape[1:]) for name, output in outputs.items() if output.shape[:1] == x.shape[:1]}


def chosen(text: str, known: Mapping[str, tuple[int, ...]], whose: str) -> list[str]:
    """The names of the layers in ``a+b``.

    Raises:
        UsageError: there is no such layer; the message lists the layers.

    """
    names = text.split("+")
    for name in names:
        if name not in known:
            listed = ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in known.items())
            hint = unknown(f"layer of {whose}:", name, known).split(" Known:")[0]
            raise UsageError(f"{hint} It has {listed}.")
    return names


def maps(known: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The last layer at each resolution, from fine to coarse: the ends of the stages of a convolutional network.

    Tokens [N, D] count as a map. For a network without maps, only the embedding.
    """
    last: dict[tuple[int, ...], str] = {}
    for name, shape in known.items():
        grid = _grid(shape)
        if max(grid) > 1:
            last.pop(grid, None)
            last[grid] = name
    return list(last.values()) or [EMBEDDING]


def as_map(features: Tensor) -> Tensor:
    """Features as a map [B, C, H, W]: tokens [B, N, D] on a square grid if N is a square; vectors as one pixel."""
    shape = tuple(features.shape[1:])
    if len(shape) == 2:
        features = features.mT
    elif _is_channels_last(shape):
        features = features.permute(0, 3, 1, 2)
    return features.reshape(len(features), channels(shape), *_grid(shape))


def channels(shape: tuple[int, ...]) -> int:
    """The number of channels that `as_map` gives for an output of this shape (without the batch dimension)."""
    return shape[-1] if len(shape) == 2 or _is_channels_last(shape) else shape[0]


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The height and width of the map that `as_map` gives for an output of this shape."""
    if len(shape) == 3:
        return shape[:2] if _is_channels_last(shape) else shape[1:]
    tokens = shape[0] if len(shape) == 2 else 1
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else (tokens, 1)


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the shape is [H, W, C], as in torchvision's transformers. Images, and so their maps, are square."""
    return len(shape) == 3 and shape[0] == shape[1] != shape[2]
