"""What clients compute: each on its own, or all that are alike in one stack.

A computation of the trainer is a request: `Fit`, `TaughtFit` or `Prediction`. In a task of `run` it is executed
together with those of the other tasks that have the same key, elsewhere at once and alone. Algorithms cannot tell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedkd import models
from fedkd.core import seeds
from fedkd.core.errors import Terminated
from fedkd.core.notes import say
from fedkd.core.tensors import shapes
from fedkd.training import loop, optimizers, stack, stacked_loop, turns
from fedkd.training.layers import WatchedModel
from fedkd.training.stack import NotStackable, Stack

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.data.scaling import Scaling
    from fedkd.training.optimizers import Step
    from fedkd.training.stacked_loop import Job
    from fedkd.training.terms.objective import DistillationObjective

MOST = 64  # clients whose computations are executed together
MOMENTS = {optimizers.sgd: 1, optimizers.adam: 2}  # tensors that an optimizer keeps of each parameter


@dataclass(frozen=True)
class Network:
    """An architecture on a device."""

    model: str
    classes: int
    norm: models.Norm
    device: str

    def build(self) -> nn.Module:
        """A new module."""
        with seeds.seeded(0):  # its values are replaced, but drawing them would change torch's own stream
            module = models.build(self.model, self.classes, self.norm)
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    @property
    def module(self) -> nn.Module:
        """The one module of this architecture, to load weights into: building costs more than loading."""
        return _module(self)

    def loaded(self, weights: Tensors) -> nn.Module:
        """The one module, with these weights."""
        self.module.load_state_dict(weights)
        return self.module

    def stacked(self, stack: Stack, weights: Sequence[Tensors], pixels: Tensor, module: nn.Module) -> nn.Module:
        """A network of all clients, made of ``module``; ``pixels`` are images of the size that they have.

        Raises:
            NotStackable: there is none that computes the same.

        """
        if reason := _why_not(self, *pixels.shape[1:3]):
            raise NotStackable(reason)
        own = shapes(module.state_dict())
        if any(shapes(each) != own for each in weights):
            raise NotStackable("a client has weights of another network")
        return stack.add(module, weights)


@lru_cache(maxsize=32)
def _module(network: Network) -> nn.Module:
    return network.build()


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


@dataclass(frozen=True)
class Training:
    """How a network is trained: what all clients of a stack have in common.

    ``optimizer`` is called with parameters, ``numbers`` and the tensors that it keeps. ``output`` is a module around
    the network that is trained, if any; ``teacher`` is the network of the clients' teachers, if they have any.
    """

    network: Network
    scaling: Scaling
    optimizer: Callable[..., Step]
    numbers: tuple[float, ...]
    epochs: int
    batch_size: int
    average: bool = False
    output: type[nn.Module] | None = None
    teacher: Network | None = None

    def alone(self, network: nn.Module, job: Job) -> None:
        """Train one client's network, in place."""
        loop.train(
            network,
            self.optimizer(list(network.parameters()), *self.numbers),
            job.pixels,
            job.targets,
            job.objective,
            self.scaling,
            epochs=self.epochs,
            batch_size=self.batch_size,
            augmentation=job.augmentation,
            seed=job.seed,
            penalty=job.penalty,
            average=self.average,
        )

    def stacked(self, network: nn.Module, stack: Stack, jobs: Sequence[Job]) -> None:
        """Train a network of all clients, in place."""
        parameters = list(network.parameters())
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        state = [torch.zeros_like(parameter) for parameter in trainable * MOMENTS[self.optimizer]]
        step = self.optimizer(parameters, *self.numbers, state)
        stacked_loop.train(
            network,
            stack,
            step,
            state,
            jobs,
            self.scaling,
            epochs=self.epochs,
            batch_size=self.batch_size,
            average=self.average,
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights of a client's network after training."""

    how: Training
    weights: Tensors
    job: Job

    @property
    def key(self) -> Hashable:
        """What requests have in common that are executed together."""
        targets = self.job.targets
        return type(self), self.how, self.job.pixels.shape[1:], targets.shape[1:], targets.dtype

    @property
    def network(self) -> Network:
        return self.how.network

    def alone(self) -> Any:
        module = self.network.loaded(self.weights)
        self.how.alone(self.how.output(module) if self.how.output else module, self.job)
        return weights_of(module)

    @staticmethod
    def stacked(requests: Sequence[Fit]) -> list[Any]:
        """The results of many; raises any exception of one of them."""
        how, stack_, jobs = requests[0].how, Stack(len(requests)), [each.job for each in requests]
        module = how.network.stacked(stack_, [each.weights for each in requests], jobs[0].pixels, how.network.module)
        how.stacked(how.output(module) if how.output else module, stack_, jobs)
        return [stack.weights_of(module, k) for k in range(len(requests))]


@dataclass(frozen=True, eq=False)
class TaughtFit(Fit):
    """The same with a teacher; ``taught`` makes the objective from the modules of student and teacher.

    The result is a pair: the weights, and those of the adapters of the objective.
    """

    teacher: Tensors
    taught: Callable[[nn.Module, nn.Module], DistillationObjective]

    def alone(self) -> Any:
        # Copied before the student is loaded: there is one module per architecture, and both may have the same.
        teacher = self._teacher()
        module = self.network.loaded(self.weights)
        both = self.taught(module, teacher)
        self.how.alone(both, replace(self.job, objective=both.loss))
        return weights_of(module), weights_of(both.terms)

    def _teacher(self) -> nn.Module:
        assert self.how.teacher is not None
        return copy.deepcopy(self.how.teacher.loaded(self.teacher)).eval().requires_grad_(False)

    @staticmethod
    def stacked(requests: Sequence[TaughtFit]) -> list[Any]:  # type: ignore[override]
        from fedkd.training.terms.objective import Taught

        how, stack_, pixels = requests[0].how, Stack(len(requests)), requests[0].job.pixels
        assert how.teacher is not None
        module, own = how.network.module, requests[0]._teacher()
        both = [each.taught(module, own) for each in requests]
        student = how.network.stacked(stack_, [each.weights for each in requests], pixels, module)
        teacher = how.teacher.stacked(stack_, [each.teacher for each in requests], pixels, own)
        network = Taught(
            WatchedModel(student, both[0].student.names), [WatchedModel(teacher, both[0].teachers[0].names)]
        )
        adapters = [list(each.terms.parameters()) for each in both]
        jobs = [
            replace(each.job, objective=its.loss, step=how.optimizer(mine, *how.numbers) if mine else None)
            for each, its, mine in zip(requests, both, adapters, strict=True)
        ]
        how.stacked(network, stack_, jobs)
        return [(stack.weights_of(student, k), weights_of(each.terms)) for k, each in enumerate(both)]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a client's network returns for images; ``output`` is a module around it, if any."""

    network: Network
    scaling: Scaling
    weights: Tensors
    pixels: Tensor
    output: type[nn.Module] | None = None

    @property
    def key(self) -> Hashable:
        return self.network, self.scaling, self.output, self.pixels.shape[1:]

    def alone(self) -> Tensor:
        module = self.network.loaded(self.weights)
        return loop.predict(self.output(module) if self.output else module, self.pixels, self.scaling)

    @staticmethod
    def stacked(requests: Sequence[Prediction]) -> list[Any]:
        first, stack_, pixels = requests[0], Stack(len(requests)), [each.pixels for each in requests]
        module = first.network.stacked(stack_, [each.weights for each in requests], pixels[0], first.network.module)
        return stacked_loop.predict(first.output(module) if first.output else module, stack_, pixels, first.scaling)


Request = Fit | Prediction


def result(request: Request) -> Any:
    """The result of a request; in a task of `run`, with those of the other tasks."""
    return turns.ask(request) if turns.is_task() else request.alone()


def pays(device: str) -> bool:
    """Whether clients are computed together on a device: on a GPU, which one client does not keep busy."""
    return device.startswith("cuda")


def run(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """What each task returns, or the exception that it raises, in their order; requests are executed together."""
    size = ceil(len(tasks) / ceil(len(tasks) / MOST)) if tasks else 1
    for start in range(0, len(tasks), size):
        yield from turns.run(tasks[start : start + size], execute)


def execute(requests: Sequence[Request]) -> list[Any]:
    """The result of each request, or its exception."""
    groups: dict[Hashable, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.key, []).append(place)
    results: dict[int, Any] = {}
    for places in groups.values():
        results |= zip(places, _executed([requests[place] for place in places]), strict=True)
    return [results[place] for place in range(len(requests))]


def _executed(requests: Sequence[Request]) -> list[Any]:
    """The results of requests with the same key: in a stack, or one after the other if that fails."""
    if len(requests) == 1:
        return [_alone(requests[0])]
    try:
        return type(requests[0]).stacked(requests)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        reason = ""
    except NotStackable as error:
        reason = str(error)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # of one client, which raises it again
        reason = f"stacked, it fails: {str(error) or type(error).__name__}"
    model = requests[0].network.model
    if not reason:
        say(f"the GPU has too little memory for {len(requests)} clients with {model} at once; half of them are tried")
        half = len(requests) // 2
        return _executed(requests[:half]) + _executed(requests[half:])
    results = [_alone(request) for request in requests]
    if not any(isinstance(each, BaseException) for each in results):
        say(f"clients with {model} are computed one after the other: {reason}")
    return results


def _alone(request: Request) -> Any:
    try:
        return request.alone()
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        return error


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, copied to the CPU and contiguous."""
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
