"""Networks by the names of their architectures: one module of each in a process, and stacks of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import seeds
from fedkd.core.tensors import shapes
from fedkd.training import models, stack
from fedkd.training.layers import EMBEDDING, Extractor, Pair, extractor_layers, layer_outputs
from fedkd.training.stack import NotStackable, Stack

if TYPE_CHECKING:
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.precision import Precision


@dataclass(frozen=True)
class Network:
    """An architecture on a device, the precision in which it is computed, and whether clients are worth a stack.

    With a ``partner`` it is a pair of two architectures (`layers.Pair`).
    """

    model: str
    classes: int
    norm: models.Norm
    device: str
    precision: Precision
    stacks: bool
    partner: str = ""

    def build(self) -> nn.Module:
        """A new module."""
        with seeds.seeded(0):  # its values are replaced, but drawing them would change torch's own stream
            names = filter(None, (self.model, self.partner))
            module, *partner = (models.build(name, self.classes, self.norm) for name in names)
        module = Pair(module, *partner) if partner else module
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    @property
    def module(self) -> nn.Module:
        """The one module of this architecture, to load weights into: building costs more than loading."""
        return _module(self)

    def loaded(self, weights: Tensors) -> nn.Module:
        """The one module, with these weights."""
        self.module.load_state_dict(weights)
        return self.module

    def frozen(self, weights: Tensors) -> nn.Module:
        """A copy with these weights, in evaluation mode, that is not trained."""
        return copy.deepcopy(self.loaded(weights)).eval().requires_grad_(False)

    def check(self, weights: Sequence[Tensors], pixels: Tensor) -> None:
        """Compare a stack of this network with two of them, on images of the size of ``pixels``.

        Raises:
            NotStackable: they differ, or a client has weights of another network.

        """
        if len(weights) > 1 and (reason := _why_not(self, *pixels.shape[1:3])):
            raise NotStackable(reason)
        own = shapes(self.module.state_dict())
        if any(shapes(each) != own for each in weights):
            raise NotStackable("a client has weights of another network")

    def stacked(self, stack: Stack) -> nn.Module:
        """A network of all clients, with any weights."""
        if stack.count == 1:
            return stack.alone(copy.deepcopy(self.module))
        return stack.add(self.module, [self.module.state_dict()] * stack.count)


@lru_cache(maxsize=32)
def _module(network: Network) -> nn.Module:
    return network.build()


@lru_cache(maxsize=32)
def head(network: Network, height: int, width: int) -> str:
    """The name of a network's last linear layer, whose input is the embedding and whose output are the logits.

    Raises:
        ValueError: it has no such layer.

    """
    module = copy.deepcopy(network.module).cpu().eval()
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), layer_outputs(module, [EMBEDDING]) as outputs:
        logits = module(x)
        name: str = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]
        expected = module.get_submodule(name)(outputs[EMBEDDING])
    is_own = f"{name}.weight" in dict(module.named_parameters())
    if not is_own or expected.shape != logits.shape or not torch.allclose(expected, logits, 1e-3, 1e-3):
        raise ValueError("its logits are not the output of its last linear layer, with weights of its own")
    return name


@lru_cache(maxsize=32)
def extractor(network: Network, height: int, width: int) -> tuple[Shapes, tuple[int, ...]]:
    """The shapes of the weights of a network's `layers.Extractor`, and of a feature map [H, W, D].

    Raises:
        ValueError: it has none.

    """
    module = copy.deepcopy(network.module).cpu().eval()
    names = extractor_layers(module)
    with torch.no_grad():
        shape = tuple(Extractor(module)(torch.zeros(1, 3, height, width)).shape[1:])
    if len(shape) != 3:
        raise ValueError("the output of its first ReLU is not a feature map")
    return shapes({name: t for name, t in module.state_dict().items() if name.split(".")[0] in names}), shape


@lru_cache(maxsize=32)
def _why_not(network: Network, height: int, width: int) -> str:
    """Why clients with this network cannot be stacked; empty if they can."""
    x = torch.randn(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        with seeds.seeded(0):
            stack.check(network.module, x)
    except NotStackable as reason:
        return str(reason)
    return ""


@lru_cache(maxsize=32)
def bytes_of(network: Network, height: int, width: int) -> tuple[int, int]:
    """Bytes of a network's weights, and of what it keeps of an image for the gradient, in float32."""
    module, kept = copy.deepcopy(network.module).cpu(), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with seeds.seeded(0), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module.train()(torch.zeros(2, 3, height, width))
    weights = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in module.state_dict().values()}
    of_images = sum(size for place, size in kept.items() if place not in weights)
    del output  # until here, so that no place is used twice
    return sum(weights.values()), of_images // 2
