"""The speed of this machine, from a few steps of training."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from fedkd.core import runtime

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.distill.config import DistillConfig

STEPS = 4


def hours(config: Config | DistillConfig, images: float) -> float:
    """The hours of training on so many images: of one process on a GPU, of one for each core on a CPU."""
    from fedkd.core.config import Config
    from fedkd.data import sources
    from fedkd.simulate.rounds import participants

    device = runtime.device(config.device)
    model = config.model.split(",")[0] if isinstance(config, Config) else config.student
    speed = images_per_second(model, config.norm, config.batch_size, sources.named(config.dataset).pixels, device)
    together = participants(config.clients, config.participation) if isinstance(config, Config) else 1
    processes = min(runtime.cores(), together) if device == "cpu" else 1
    return images / speed / processes / 3600


@lru_cache
def images_per_second(model: str, norm: Literal["group", "batch"], batch_size: int, pixels: int, device: str) -> float:
    """The images on which one process trains in a second, by plain steps on random images of 10 classes."""
    import torch
    from torch import nn

    from fedkd.data.scaling import Scaling
    from fedkd.training import loop, models, optimizers

    runtime.settle(1)
    module = models.build(model, 10, norm)
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, pixels, pixels, 3), generator=generator).to(torch.uint8)
    step = optimizers.sgd([*module.parameters()], 0.9, 0.0)
    about = (torch.zeros(batch_size, dtype=torch.long), nn.functional.cross_entropy, Scaling.of(images))

    def train(steps: int) -> float:
        begin, plain = time.perf_counter(), loop.Augmentation()
        loop.train(
            module,
            step,
            images,
            *about,
            rates=[0],
            epochs=1,
            batch_size=batch_size,
            augmentation=plain,
            seed=0,
            steps=steps,
        )
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    train(1)
    return STEPS * batch_size / train(STEPS)
