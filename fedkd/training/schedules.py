"""Schedules: the factor of the learning rate after ``done`` of ``total`` steps, of which ``unit`` are an epoch.

In ``fedkd.simulate`` a step of local training's schedule is a round, and so is an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from fedkd.core import specs
from fedkd.core.errors import UsageError

Factor = Annotated[float, Field(gt=0, le=1)]


def _rising(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        raise ValueError("each milestone is after the one before it, as in 50+75")
    return milestones


Milestones = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(lambda value: value.split("+") if isinstance(value, str) else value),
    AfterValidator(_rising),
]


def constant(done: int, total: int, unit: int) -> float:
    """The same learning rate throughout."""
    return 1.0


def cosine(done: int, total: int, unit: int) -> float:
    """From the learning rate towards zero, along half a wave (Loshchilov and Hutter, 2017)."""
    return (1 + math.cos(math.pi * done / total)) / 2


def exponential(done: int, total: int, unit: int, *, gamma: Factor = 0.99) -> float:
    """Multiplied by gamma after every epoch or round, as ``torch.optim.lr_scheduler.ExponentialLR``."""
    return float(gamma ** (done // unit))


def step(done: int, total: int, unit: int, *, milestones: Milestones, gamma: Factor = 0.1) -> float:
    """Multiplied by gamma after each of these epochs or rounds, as ``torch.optim.lr_scheduler.MultiStepLR``."""
    return float(gamma ** sum(done // unit >= milestone for milestone in milestones))


def factor(spec: str, done: int, total: int, unit: int = 1) -> float:
    """The factor by a schedule.

    Raises:
        UsageError: there is no such schedule, or it lacks an option.

    """
    return float(_named(spec)(done, total, unit))


def rates(spec: str, peak: float, total: int, unit: int = 1) -> tuple[float, ...]:
    """The learning rate of each of ``total`` steps by a schedule.

    Raises:
        UsageError: as `factor`.

    """
    of_step = _named(spec)
    return tuple(peak * of_step(done, total, unit) for done in range(total))


def _named(spec: str) -> Callable[[int, int, int], float]:
    found = specs.built_in("schedule", spec)
    if found.func is step and "milestones" not in found.keywords:
        raise UsageError(f"schedule {spec!r} needs milestones, as in step:milestones=50+75.")
    return found
