"""The training loop and prediction. Only this module and `fedkd.training.stacked_loop` call ``backward``.

Images are uint8 [N, H, W, 3]. Viewed as [N, 3, H, W] they are in channels_last order without a copy,
the fastest layout for convolutions on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.core.errors import UsageError
from fedkd.core.seeds import seeded
from fedkd.data import augment
from fedkd.data.scaling import Scaling
from fedkd.training import optimizers
from fedkd.training.early_stopping import Best, EarlyStopping, mean_after
from fedkd.training.layers import EMBEDDING, layer_outputs
from fedkd.training.objectives import on_device
from fedkd.training.precision import Precision, computing, output_of

if TYPE_CHECKING:
    from fedkd.training.optimizers import Step

CPU_CHUNK, GPU_CHUNK = 64, 2048  # images per forward pass: fits the cache of a CPU core; fills a GPU

Objective = Callable[[Any, Tensor], Tensor]  # (output of the model, targets) -> scalar
Penalty = Callable[[Mapping[str, Tensor]], Tensor]  # named parameters -> scalar that is added to the loss


@dataclass(frozen=True)
class Augmentation:
    """Whether images are randomly cropped and flipped; with ``first``, only samples with an index below it."""

    crop: bool = False
    flip: bool = False
    first: int | None = None

    def __call__(self, images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
        """The augmented images [B, H, W, 3]; ``indices`` [B] are those of the samples."""
        return augment.apply(images, self.draw([indices], generator).to(images.device)) if self.crop else images

    def draw(self, batches: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """What happens to the images of these batches of samples [3, N] (`augment.draw`)."""
        sizes = list(map(len, batches))
        if not self.crop:
            return augment.unchanged(sum(sizes))
        draws = augment.draw(sizes, self.flip, generator)
        if self.first is None:
            return draws
        return torch.where(torch.cat(list(batches)) < self.first, draws, augment.unchanged(sum(sizes)))


def train(
    model: nn.Module,
    step: Step,
    pixels: Tensor,
    targets: Tensor,
    objective: Objective,
    scaling: Scaling | Callable[[Tensor], Tensor],
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    steps: int = 0,
    penalty: Penalty | None = None,
    average: bool = False,
    stopping: EarlyStopping | None = None,
    precision: Precision = "float32",
) -> None:
    """Minimize ``objective`` over (pixels, targets), in place. ``seed`` determines the order and the augmentation.

    ``rates`` are the learning rates of the steps; the last one is that of all further steps.

    With ``steps`` above 0 there are so many steps, and as many epochs as this takes; the last one may be cut.

    With ``average`` the result is the mean of the weights after each epoch (stochastic weight averaging: Izmailov et
    al., 2018). With ``stopping`` it is what the best of the measured numbers of steps would give.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    sizes = batch_sizes(model, len(pixels), batch_size)
    lengths = epoch_lengths(len(sizes), epochs, steps)
    ends = set(accumulate(filter(None, lengths)))
    tensors = [tensor.detach() for tensor in model.state_dict().values()]
    rate_of_steps = iter(optimizers.rates_for(rates, sum(lengths), device).tolist())  # to the bit as if recorded
    objective, penalty = on_device(objective, device), penalty and on_device(penalty, device)
    model.train()
    model.zero_grad()  # of a training that failed
    with seeded(seed), computing(precision):  # seeded for dropout, which draws from torch's own stream
        sums = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors] if average else []

        def validate(images: Tensor) -> Tensor:
            logits = predict(model, images, scaling, precision)
            model.train()
            return logits

        def result(number: int) -> Sequence[Tensor]:
            return mean_after(number, tensors, sums, ends) if average else tensors

        best = Best(stopping, tensors, sum(lengths), validate, result) if stopping else None
        for number, indices in enumerate(_order(sizes, lengths, generator), 1):
            images = augmentation(pixels.index_select(0, indices.to(pixels.device)).to(device), indices, generator)
            loss = objective(output_of(model, scaling(images), precision), targets[indices].to(device))
            if penalty is not None:
                loss = loss + penalty(dict(model.named_parameters()))
            loss.backward()  # type: ignore[no-untyped-call]
            step(next(rate_of_steps))
            for total, tensor in zip(sums, tensors, strict=False) if number in ends else ():  # no sums, no average
                total += tensor
            if best is not None and best.ends(number):
                break
        for tensor, value in zip(tensors, best.weights if best else result(sum(lengths)), strict=True):
            tensor.copy_(value)


def _order(sizes: list[int], lengths: Sequence[int], generator: torch.Generator) -> Iterator[Tensor]:
    """The indices of the samples in each batch of all epochs, drawn when an epoch begins."""
    for length in lengths:
        yield from batches(sizes, generator)[:length]


def batch_sizes(model: nn.Module, count: int, size: int) -> list[int]:
    """The number of samples in each batch of an epoch over ``count`` samples; the last batch may be smaller.

    BatchNorm has no statistics of one sample: with it, a last batch of one is merged with the batch before it, and
    left out if it is the only batch.
    """
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if sizes[-1:] == [1] and has_batch_norm(model):
        sizes[-2:] = [sum(sizes[-2:])] if len(sizes) > 1 else []
    return sizes


def epoch_lengths(batches: int, epochs: int, steps: int = 0) -> list[int]:
    """The number of batches of each epoch, out of ``batches``; if ``steps`` is above 0, of so many steps in all."""
    if not steps or not batches:
        return [batches] * epochs
    full, rest = divmod(steps, batches)
    return [batches] * full + [rest] * (rest > 0)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it has BatchNorm layers. In training they compare samples, so that a batch needs at least two."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def check_batch_norm(model: nn.Module, name: str, size: int, option: str) -> None:
    """Refuse batches of a single sample for a network with BatchNorm layers.

    Raises:
        UsageError: the size is one, and the network ``name`` has such layers; the message says so of ``option``.

    """
    if size == 1 and has_batch_norm(model):
        raise UsageError(
            f"{option} cannot be 1 with {name}, whose BatchNorm layers cannot be trained on one sample; "
            "it must be at least 2."
        )


def batches(sizes: list[int], generator: torch.Generator) -> tuple[Tensor, ...]:
    """The indices of the samples in each batch of an epoch, shuffled, for the size of each batch."""
    return torch.split(torch.randperm(sum(sizes), generator=generator), sizes)


class Embedded(nn.Module):
    """A model that returns its logits [B, C] and its embedding [B, D], the input of its last linear layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both.

        Raises:
            ValueError: the model has no linear layer.

        """
        with layer_outputs(self.model, [EMBEDDING]) as outputs:
            return self.model(x), outputs[EMBEDDING]


class Embedding(Embedded):
    """A model that returns only its embedding [B, D]."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[1]


def predict(
    model: nn.Module, pixels: Tensor, scaling: Scaling | Callable[[Tensor], Tensor], precision: Precision = "float32"
) -> Tensor:
    """The model's output, usually logits [N, C], float32 on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    model.eval()
    with torch.inference_mode(), computing(precision):
        parts = torch.split(pixels, chunk)
        first = output_of(model, scaling(parts[0].to(device)), precision)
        # Filled in place: small results between large buffers would fragment the heap, which then grows.
        logits = torch.empty(len(pixels), *first.shape[1:])
        for part, rows in zip(parts, torch.split(logits, chunk), strict=True):
            rows.copy_(first if part is parts[0] else output_of(model, scaling(part.to(device)), precision))
    return logits.clone()  # a normal tensor, not an inference tensor, so that it can be a training target


def misfit(model: nn.Module, images: Tensor, classes: int) -> str:
    """What a model returns for images [B, 3, H, W] instead of logits [B, C], or else lacks, in words; empty if nothing.

    It is tried in evaluation and in training, which changes the statistics of its normalization layers.
    """
    expected = (len(images), classes)
    for mode in ("", " in training"):
        with seeded(0), torch.no_grad():
            output = model.train(bool(mode))(images)
        what = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if what != expected:
            return f"returns {what} for {len(images)} images{mode}, not {expected}"
    return "" if any(parameter.requires_grad for parameter in model.parameters()) else "has no parameters to train"


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, copied to the CPU and contiguous."""
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean negative log-likelihood, in nats."""
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits.double(), labels).item()
