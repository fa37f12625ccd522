"""K clients with networks of one architecture as one network, so that they are computed by the same kernels.

Activations stay [K * B, C, H, W], the batches of the clients one after the other, so that containers and whatever else
has no parameters run unchanged. Only layers with parameters change: their parameters and buffers get a first
dimension [K, ...] under their old names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedkd.core.seeds import seeded
from fedkd.training import kernels, precision
from fedkd.training.kernels import convolution, normalization, pooling

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.training.precision import Precision


class NotStackable(Exception):  # noqa: N818
    """A network that can only be computed client by client; the message says why."""


class Stack:
    """K clients whose networks are computed together, and what their layers need to know of the current batch.

    ``sizes`` are the numbers of samples of the clients. The rows after them, up to the longest batch, are padding:
    ``is_real`` [K, B] is false for these, and BatchNorm leaves them out. ``streams`` are the random numbers of the
    clients for dropout.
    """

    def __init__(self, count: int, precision: Precision = "float32") -> None:
        self.count = count
        self.precision = precision
        self.sizes: Sequence[int] = ()
        self.is_real: Tensor | None = None
        self.streams: list[torch.Generator] = []
        self.is_plain = False
        self._tensors: list[Tensor] = []

    def add(self, module: nn.Module, weights: Sequence[Tensors]) -> nn.Module:
        """A new network that applies ``module`` with the weights of each client to the batch of this client.

        Raises:
            NotStackable: a layer with parameters or buffers is of a type or has an option that is not known here.

        """
        stacked = copy.deepcopy(module)
        new: dict[Tensor, Tensor] = {}  # by what they replace, which layers may share
        for path, layer in stacked.named_modules():
            kept = [(of, name) for of in (layer._parameters, layer._buffers) for name, t in of.items() if t is not None]
            if type(layer) in _LAYERS and not _is_unusual(layer):
                layer.__class__ = _LAYERS[type(layer)]  # as torch.nn.utils.parametrize does
                layer._stack = self
            elif type(layer) in _LAYERS or kept:
                raise NotStackable(f"its layer {path or 'root'} ({type(layer).__name__}) cannot be stacked")
            for tensors, name in kept:
                old = tensors[name]
                if old not in new:
                    values = torch.stack([each[f"{path}.{name}" if path else name] for each in weights]).to(old)
                    if isinstance(layer, _Conv2d) and values.dim() == 5 and layer._has_kernel(values):
                        values = convolution.taps_first(values)
                    new[old] = nn.Parameter(values, old.requires_grad) if tensors is layer._parameters else values
                tensors[name] = new[old]
        self._tensors += new.values()
        return stacked

    def alone(self, module: nn.Module) -> nn.Module:
        """The module itself, as the network of a stack of one client, whose layers know nothing of stacks."""
        assert self.count == 1
        self.is_plain = True
        self._tensors += [tensor.detach()[None] for tensor in (*module.parameters(), *module.buffers())]
        return module

    def load(self, network: nn.Module, weights: Sequence[Tensors]) -> None:
        """Copy the weights of each client into a network that `add` or `alone` has returned."""
        for name, tensor in network.state_dict().items():
            values = [each[name] for each in weights]
            self.of_clients(tensor).copy_(torch.stack(values))

    def weights(self, network: nn.Module) -> list[dict[str, Tensor]]:
        """The parameters and buffers of each client in a network, copied to the CPU and contiguous."""
        clients: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        for name, tensor in network.state_dict().items():  # one copy from the device for all clients
            for client, values in zip(clients, self.of_clients(tensor.detach().cpu()), strict=True):
                client[name] = values.clone(memory_format=torch.contiguous_format)
        return clients

    def add_parameters(self, own: Sequence[Iterable[nn.Parameter]]) -> list[nn.Parameter]:
        """New parameters [K, ...] of those that clients have besides a network, such as a loss with adapters."""
        groups = zip(*own, strict=True)
        added = [nn.Parameter(torch.stack([p.detach() for p in each]), each[0].requires_grad) for each in groups]
        self._tensors += added
        return added

    def of_clients(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer as [K, ...]."""
        return tensor[None] if self.is_plain else tensor

    def output_of(self, network: nn.Module, x: Tensor) -> Any:
        """What a network returns. Its layers have the precision of the stack; PyTorch casts for those that do not."""
        output = precision.output_of(network, x, self.precision if self.is_plain else "float32")
        return normalization.computed(output)

    def cast(self, x: Tensor) -> Tensor:
        """Activations of floating point in the type in which layers compute."""
        return x.bfloat16() if self.precision == "bfloat16" and x.dtype == torch.float32 else x

    def computing(self) -> AbstractContextManager[None]:
        """A context in which PyTorch's own products of float32 have the precision of the stack, too."""
        return precision.computing(self.precision)

    def split(self, rows: Tensor) -> Tensor:
        """Rows [K * B, ...] as [K, B, ...]."""
        return rows.view(self.count, -1, *rows.shape[1:])

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters and buffers [K, ...] of all its networks."""
        return list(self._tensors)


def check(module: nn.Module, x: Tensor) -> None:
    """Compare a stack of two clients with their two networks, on an even number of images [B, 3, H, W].

    Raises:
        NotStackable: `Stack.add` raises it, or the networks differ, as where a sample depends on others of its batch.

    """
    own = [copy.deepcopy(module).cpu().double().train() for _ in range(2)]
    stack, halves, wanted = Stack(2), x.cpu().double().chunk(2), []
    stack.sizes, stack.streams = list(map(len, halves)), [torch.Generator().manual_seed(k) for k in range(2)]
    with torch.no_grad():
        for parameter in own[1].parameters():
            parameter.add_(0.1)
        network = stack.add(own[0], [each.state_dict() for each in own])
        try:
            output = network(torch.cat(halves))
        except Exception as error:  # from code that was written for other shapes
            raise NotStackable(f"stacked, it fails: {error}") from error
        for k, (each, half) in enumerate(zip(own, halves, strict=True)):
            with seeded(k):
                wanted.append(each(half))
    if not isinstance(output, Tensor) or not torch.allclose(output, torch.cat(wanted), 1e-3, 1e-3):
        raise NotStackable("stacked, its outputs differ")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of each client: x [K * B, ..., I], weight [K, O, I], bias [K, O].

    Of vectors in bfloat16 it is float32, as these may be logits.
    """
    x = x.to(weight) if x.dim() == 2 else x
    weight, bias = weight.to(x), None if bias is None else bias.to(x)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return y.view(*x.shape[:-1], -1)


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    """Values [K, C] of the channels, to be broadcast to x [K, B, C, ...]."""
    return values.view(len(values), 1, -1, *[1] * (x.dim() - 3))


class _Layer(nn.Module):
    _stack: Stack


class _Conv2d(_Layer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x, stack = self._stack.cast(x), self._stack
        if self._has_kernel(x):
            products: convolution.Precision = "tf32" if stack.precision == "tf32" else "ieee"
            return convolution.conv2d(x, self.weight, self.bias, self.stride, self.padding, products)  # type: ignore[arg-type]
        return convolution.grouped_conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def _has_kernel(self, x: Tensor) -> bool:
        return not isinstance(self.padding, str) and convolution.covers(x, self.groups, self.dilation)  # type: ignore[arg-type]


class _Linear(_Layer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(self._stack.cast(x), self.weight, self.bias)


class _GroupNorm(_Layer, nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self._stack.cast(x)
        if self.affine and x.dim() == 4 and kernels.is_available(x):
            compute = partial(normalization.group_norm, x, self.weight, self.bias, self.num_groups, self.eps)
            return normalization.Normalized(compute) if torch.is_grad_enabled() else compute()
        y = self._stack.split(F.group_norm(x, self.num_groups, eps=self.eps))
        if self.affine:
            y = y * _of_channels(self.weight, y) + _of_channels(self.bias, y)
        return y.flatten(0, 1).to(x)


class _LayerNorm(_Layer, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self._stack.cast(x)
        y = self._stack.split(F.layer_norm(x, self.normalized_shape, eps=self.eps))
        shape = (self._stack.count, *[1] * (x.dim() - len(self.normalized_shape)), *self.normalized_shape)
        if self.elementwise_affine:
            y = y * self.weight.view(shape)
            y = y if self.bias is None else y + self.bias.view(shape)
        return y.flatten(0, 1).to(x)


class _BatchNorm(_Layer, nn.modules.batchnorm._BatchNorm):
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self._stack.cast(x)
        y = self._stack.split(x).to(self.running_mean)
        mean, variance = self._statistics(y) if self.training else (self.running_mean, self.running_var)
        y = (y - _of_channels(mean, y)) * _of_channels((variance + self.eps).rsqrt(), y)
        if self.affine:
            y = y * _of_channels(self.weight, y) + _of_channels(self.bias, y)
        return y.flatten(0, 1).to(x)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance [K, C] of a batch [K, B, C, ...] without padding; updates the running ones."""
        is_real = self._stack.is_real
        share = x.new_ones(x.shape[:2]) if is_real is None else is_real.to(x.dtype)
        count = share.sum(1, keepdim=True) * x[0, 0, 0].numel()
        share, over = share.view(*x.shape[:2], *[1] * (x.dim() - 2)), (1, *range(3, x.dim()))
        mean = (x * share).sum(over) / count
        variance = ((x - _of_channels(mean, x)).square() * share).sum(over) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / self.num_batches_tracked[:, None] if self.momentum is None else self.momentum
            self.running_mean += rate * (mean - self.running_mean)
            self.running_var += rate * (variance * count / (count - 1) - self.running_var)
        return mean, variance


class _MaxPool2d(_Layer, nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        size = pooling.window(self)
        return pooling.max_pool2d(x, size) if size and x.dim() == 4 and kernels.is_available(x) else super().forward(x)


class _Embedding(_Layer, nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        first = torch.arange(self._stack.count, device=x.device) * self.num_embeddings  # of a client
        rows = self._stack.split(x)
        return F.embedding(rows + first.view(-1, *[1] * (rows.dim() - 1)), self.weight.flatten(0, 1)).flatten(0, 1)


class _Dropout(_Layer, nn.Dropout):
    """Each client draws from its own stream what it would draw on its own, on the CPU to the bit."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = torch.zeros_like(x)
        for rows, size, stream in zip(self._stack.split(keep), self._stack.sizes, self._stack.streams, strict=True):
            rows[:size] = torch.empty_like(rows[:size]).bernoulli_(1 - self.p, generator=stream)
        return x * keep.div_(1 - self.p)


class _MultiheadAttention(_Layer, nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        if options != {"need_weights": False}:
            raise NotStackable("its attention is masked, or its weights are used")
        query, key, value = map(self._stack.cast, (query, key, value))
        weights = self.in_proj_weight.chunk(3, 1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3, 1)
        q, k, v = (
            linear(x, weight, bias).view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


_LAYERS: dict[type[nn.Module], type[_Layer]] = {
    nn.Conv2d: _Conv2d,
    nn.Linear: _Linear,
    NonDynamicallyQuantizableLinear: _Linear,  # in attention
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.MaxPool2d: _MaxPool2d,
    nn.Embedding: _Embedding,
    nn.Dropout: _Dropout,
    nn.MultiheadAttention: _MultiheadAttention,
}


def _is_unusual(layer: nn.Module) -> bool:
    """Whether a layer has options that its stacked version ignores."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode != "zeros"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return not layer.track_running_stats
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is not None or layer.max_norm is not None
    if isinstance(layer, nn.MultiheadAttention):
        is_plain = layer.batch_first and layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn
        return not is_plain or layer.dropout > 0
    return False
