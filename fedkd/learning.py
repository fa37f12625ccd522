"""Fitting, distilling, predicting, evaluating: the only module that calls ``backward``.

Images are uint8 [N, H, W, 3]; seen as [N, 3, H, W] they are in channels_last order without a copy,
the layout in which CPUs and GPUs convolve fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.data.augment import crop_and_flip
from fedkd.data.scaling import Scaling
from fedkd.optimizers import Step
from fedkd.seeds import seeded

CPU_CHUNK, GPU_CHUNK = 64, 2048  # images a forward pass: what fits the cache of a CPU core, what fills a GPU

Objective = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], targets of these rows -> scalar


@dataclass(frozen=True)
class Augmentation:
    """Whether images are cropped at random, and whether they are flipped."""

    crop: bool = False
    flip: bool = False


@dataclass(frozen=True)
class Anchor:
    """A proximal term mu / 2 * ||w - w0||^2 over the parameters (FedProx: Li et al., 2020)."""

    mu: float
    parameters: Mapping[str, Tensor]


def descend(
    model: nn.Module,
    step: Step,
    pixels: Tensor,
    targets: Tensor,
    objective: Objective,
    scaling: Scaling,
    *,
    epochs: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    anchor: Anchor | None = None,
) -> None:
    """Minimize ``objective`` over (pixels, targets), in place. Order and augmentation follow ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    with seeded(seed):  # for dropout, which draws from torch's own stream
        for rows in batches(len(pixels), epochs, batch_size, generator):
            images, wanted = pixels[rows].to(device), targets[rows].to(device)
            if augmentation.crop:
                images = crop_and_flip(images, augmentation.flip, generator)
            loss = objective(model(scaling(images)), wanted)
            if anchor is not None:
                loss = loss + proximal(model, anchor)
            loss.backward()  # type: ignore[no-untyped-call]
            step()


def batches(count: int, epochs: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each batch: a fresh shuffle an epoch, the last batch of it may be smaller."""
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=generator), size)


def proximal(model: nn.Module, anchor: Anchor) -> Tensor:
    """Mu / 2 times the squared distance of the parameters from the anchor's."""
    distances = [(p - anchor.parameters[n].to(p.device)).square().sum() for n, p in model.named_parameters()]
    return 0.5 * anchor.mu * torch.stack(distances).sum()


def predict(model: nn.Module, pixels: Tensor, scaling: Scaling) -> Tensor:
    """Logits [N, C] float32 on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    model.eval()
    with torch.inference_mode():
        parts = torch.split(pixels, chunk)
        first = model(scaling(parts[0].to(device)))
        # Filled in place: small results kept between big buffers would break up the heap, which then grows.
        logits = torch.empty(len(pixels), *first.shape[1:])
        for part, rows in zip(parts, torch.split(logits, chunk), strict=True):
            rows.copy_(first if part is parts[0] else model(scaling(part.to(device))))
    return logits.clone()  # a plain tensor again, which may be trained on


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean negative log-likelihood, in nats."""
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits.double(), labels).item()
