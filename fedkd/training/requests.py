"""What clients ask the trainer for: each computed on its own, or all that are alike in one stack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedkd import models
from fedkd.core import seeds
from fedkd.core.tensors import shapes
from fedkd.training import graphs, loop, optimizers, stack, stacked_loop
from fedkd.training.layers import WatchedModel
from fedkd.training.objectives import function_of
from fedkd.training.stack import NotStackable, Stack
from fedkd.training.stacked_loop import Learner

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.data.scaling import Scaling
    from fedkd.training.batches import Job
    from fedkd.training.optimizers import Step
    from fedkd.training.precision import Precision
    from fedkd.training.terms.objective import DistillationObjective


@dataclass(frozen=True)
class Network:
    """An architecture on a device, the precision in which it is computed, and whether clients are worth a stack."""

    model: str
    classes: int
    norm: models.Norm
    device: str
    precision: Precision
    stacks: bool

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
def _bytes(network: Network, height: int, width: int) -> tuple[int, int]:
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
            precision=self.network.precision,
        )

    def stacked(self, learner: Learner, jobs: Sequence[Job], smaller: Callable[[int], Learner]) -> None:
        """Train a network of all clients, in place."""
        options: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size, "average": self.average}
        stacked_loop.train(learner, jobs, self.scaling, smaller=smaller, **options)

    def learner(self, count: int) -> Learner:
        """A stack of so many clients, always the same one, with any weights."""
        learner: Learner = graphs.kept((self, count), lambda: self._built(count))
        for tensor in learner.state:
            tensor.zero_()
        return learner

    def _built(self, count: int) -> Learner:
        own = Stack(count, self.network.precision)
        network = self.network.stacked(own)
        return self.around(self.output(network) if self.output else network, own)

    def around(self, network: nn.Module, own: Stack) -> Learner:
        """What trains a network."""
        parameters = list(network.parameters())
        state = optimizers.state_of(self.optimizer, parameters)
        return Learner(network, own, self.optimizer(parameters, *self.numbers, state), state)


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights of a client's network after training."""

    how: Training
    weights: Tensors
    job: Job

    @property
    def key(self) -> Hashable:
        """What requests have in common that are executed together."""
        targets, penalty = self.job.targets, function_of(self.job.penalty)
        return type(self), self.how, self.job.pixels.shape[1:], targets.shape[1:], targets.dtype, penalty

    @property
    def network(self) -> Network:
        return self.how.network

    def room(self) -> int:
        """How many clients fit into the memory of the GPU.

        Weights, gradients, updates and what the optimizer keeps, twice for the smaller stacks of those that go on; and
        what the backward pass needs of a batch, twice for its own gradients.
        """
        weights, image = _bytes(self.network, *self.job.pixels.shape[1:3])
        return max(1, graphs.memory(self.network.device) // (2 * 5 * weights + 2 * self.how.batch_size * image))

    def alone(self) -> Any:
        module = self.network.loaded(self.weights)
        self.how.alone(self.how.output(module) if self.how.output else module, self.job)
        return weights_of(module)

    @staticmethod
    def stacked(requests: Sequence[Fit]) -> list[Any]:
        """The results of many; raises any exception of one of them."""
        how, weights, jobs = requests[0].how, [each.weights for each in requests], [each.job for each in requests]
        how.network.check(weights, jobs[0].pixels)
        learner = how.learner(len(requests))
        network = _within(learner.network) if how.output else learner.network
        learner.stack.load(network, weights)
        how.stacked(learner, jobs, how.learner)
        return learner.stack.weights(network)


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
        from fedkd.training.terms.objective import Taught, adapted_losses

        how, pixels, of_teacher = requests[0].how, requests[0].job.pixels, requests[0].how.teacher
        assert of_teacher is not None
        how.network.check([each.weights for each in requests], pixels)
        of_teacher.check([each.teacher for each in requests], pixels)
        own = requests[0]._teacher()
        both = [each.taught(how.network.module, own) for each in requests]
        watched = both[0].student.names, both[0].teachers[0].names

        def built(count: int) -> Learner:
            stack = Stack(count, how.network.precision)
            student, teacher = how.network.stacked(stack), of_teacher.stacked(stack).eval().requires_grad_(False)
            adapters = stack.add_parameters([each.terms.parameters() for each in both[:count]])
            pair = WatchedModel(student, watched[0]), [WatchedModel(teacher, watched[1])]
            return how.around(Taught(*pair, adapters), stack)

        learner = built(len(requests))
        taught = cast(Taught, learner.network)
        student, teacher = _within(taught.student), _within(taught.teachers[0])
        learner.stack.load(student, [each.weights for each in requests])
        learner.stack.load(teacher, [each.teacher for each in requests])
        losses = adapted_losses(both)
        jobs = [replace(each.job, objective=loss) for each, loss in zip(requests, losses, strict=True)]
        how.stacked(learner, jobs, built)
        for k, each in enumerate(both):
            for parameter, trained in zip(each.terms.parameters(), taught.adapters, strict=True):
                parameter.data = trained.detach()[k]
        weights = learner.stack.weights(student)
        return [(mine, weights_of(each.terms)) for mine, each in zip(weights, both, strict=True)]


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

    def room(self) -> int:
        """How many clients fit into the memory of the GPU; the number of images at once does not depend on it."""
        return max(1, graphs.memory(self.network.device) // (2 * _bytes(self.network, *self.pixels.shape[1:3])[0]))

    def alone(self) -> Tensor:
        module = self.network.loaded(self.weights)
        network = self.output(module) if self.output else module
        return loop.predict(network, self.pixels, self.scaling, self.network.precision)

    @staticmethod
    def stacked(requests: Sequence[Prediction]) -> list[Any]:
        first, pixels = requests[0], [each.pixels for each in requests]
        first.network.check([each.weights for each in requests], first.pixels)
        stack, network = graphs.kept((first.network, len(requests)), partial(first._built, len(requests)))
        stack.load(network, [each.weights for each in requests])
        return stacked_loop.predict(first.output(network) if first.output else network, stack, pixels, first.scaling)

    def _built(self, count: int) -> tuple[Stack, nn.Module]:
        stack = Stack(count, self.network.precision)
        return stack, self.network.stacked(stack)


def _within(network: nn.Module) -> nn.Module:
    """The network in a module around it."""
    return cast(nn.Module, network.model)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, copied to the CPU and contiguous."""
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
