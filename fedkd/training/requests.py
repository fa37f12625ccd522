"""What clients ask the trainer for: each computed on its own, or all that are alike in one stack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fedkd.core import specs
from fedkd.training import graphs, loop, optimizers, stacked_loop
from fedkd.training.layers import WatchedModel, WithTeachers
from fedkd.training.networks import Network, bytes_of
from fedkd.training.objectives import function_of
from fedkd.training.stack import Stack
from fedkd.training.stacked_loop import Learner

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.data.scaling import Scaling
    from fedkd.training.batches import Job
    from fedkd.training.optimizers import Step
    from fedkd.training.terms.objective import DistillationObjective


@dataclass(frozen=True)
class Training:
    """How a network is trained: what all clients of a stack have in common.

    ``optimizer`` is a spec; it is called with parameters, ``numbers`` and the tensors that it keeps. Learning rates are
    not among the numbers: what is recorded is kept by all of this, and rates may differ in each round. ``output`` is a
    module around the network that is trained, and each teacher, if any; ``teachers`` are the networks of a client's
    teachers.
    """

    network: Network
    scaling: Scaling | Callable[[Tensor], Tensor]
    optimizer: str
    numbers: tuple[float, ...]
    epochs: int
    batch_size: int
    steps: int = 0
    clip_norm: float = 0.0
    average: bool = False
    output: type[nn.Module] | None = None
    teachers: tuple[Network, ...] = ()

    def alone(self, network: nn.Module, job: Job, rates: Sequence[float]) -> None:
        """Train one client's network, in place."""
        loop.train(
            network,
            self._step(list(network.parameters())),
            job.pixels,
            job.targets,
            job.objective,
            self.scaling,
            rates=rates,
            epochs=self.epochs,
            batch_size=self.batch_size,
            steps=self.steps,
            augmentation=job.augmentation,
            seed=job.seed,
            penalty=job.penalty,
            average=self.average,
            stopping=job.stopping,
            precision=self.network.precision,
        )

    def stacked(
        self, learner: Learner, jobs: Sequence[Job], rates: Sequence[float], smaller: Callable[[int], Learner]
    ) -> None:
        """Train a network of all clients, in place."""
        options: dict[str, Any] = {"epochs": self.epochs, "steps": self.steps, "average": self.average}
        options |= {"rates": rates, "batch_size": self.batch_size, "smaller": smaller}
        stacked_loop.train(learner, jobs, self.scaling, **options)

    def learner(self, count: int) -> Learner:
        """A stack of so many clients, always the same one, with any weights."""
        learner: Learner = graphs.kept((self, count), lambda: self._built(count))
        for tensor in learner.state:
            tensor.zero_()
        return learner

    def _built(self, count: int) -> Learner:
        own = Stack(count, self.network.precision)
        return self.around(self.module(self.network.stacked(own), self.stacked_teachers(own)), own)

    def stacked_teachers(self, own: Stack) -> list[nn.Module]:
        """The teachers of all clients, with any weights."""
        return [teacher.stacked(own).eval().requires_grad_(False) for teacher in self.teachers]

    def module(self, network: nn.Module, teachers: Sequence[nn.Module]) -> nn.Module:
        """The module whose output the objective gets."""
        if self.output:
            network, teachers = self.output(network), [self.output(teacher) for teacher in teachers]
        return WithTeachers(network, teachers) if teachers else network

    def networks(self, module: nn.Module) -> list[nn.Module]:
        """The network and the teachers of such a module."""
        parts = [module.student, *module.teachers] if isinstance(module, WithTeachers) else [module]
        return [cast(nn.Module, part.model) for part in parts] if self.output else parts

    def around(self, network: nn.Module, own: Stack) -> Learner:
        """What trains a network."""
        parameters = list(network.parameters())
        state = optimizers.state_of(self._optimizer, parameters)
        return Learner(network, own, self._step(parameters, state, own.of_clients), state)

    def _step(self, parameters: Sequence[Tensor], state: list[Tensor] | None = None, *of_clients: Any) -> Step:
        step = self._optimizer(parameters, *self.numbers, state)
        return optimizers.clipped(step, parameters, self.clip_norm, *of_clients) if self.clip_norm else step

    @property
    def _optimizer(self) -> Callable[..., Step]:
        return specs.built_in("optimizer", self.optimizer)


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights of a client's network after training.

    ``rates`` are the learning rates of its steps, and ``teachers`` the weights of its teachers.
    """

    how: Training
    weights: Tensors
    job: Job
    rates: tuple[float, ...]
    teachers: Sequence[Tensors] = ()

    @property
    def key(self) -> Hashable:
        """What requests have in common that are executed together."""
        targets, penalty = self.job.targets, function_of(self.job.penalty)
        shapes = self.job.pixels.shape[1:], targets.shape[1:], targets.dtype
        return type(self), self.how, shapes, penalty, self.rates, self.job.stopping  # each stops on its own

    @property
    def network(self) -> Network:
        return self.how.network

    def room(self) -> int:
        """How many clients fit into the memory of the GPU.

        Weights, gradients, updates, what the optimizer keeps and teachers, twice for the smaller stacks of those that
        go on; and what the backward pass needs of a batch, twice for its own gradients.
        """
        size = self.job.pixels.shape[1:3]
        weights, image = bytes_of(self.network, *size)
        of_teachers = sum(bytes_of(teacher, *size)[0] for teacher in self.how.teachers)
        each = 2 * (5 * weights + of_teachers) + 2 * self.how.batch_size * image
        return max(1, graphs.memory(self.network.device) // each)

    def alone(self) -> Any:
        # Copied before the student is loaded: there is one module per architecture, and both may have the same.
        teachers = self._teachers()
        module = self.network.loaded(self.weights)
        self.how.alone(self.how.module(module, teachers), self.job, self.rates)
        return loop.weights_of(module)

    def _teachers(self) -> list[nn.Module]:
        pairs = zip(self.how.teachers, self.teachers, strict=True)
        return [network.frozen(weights) for network, weights in pairs]

    @staticmethod
    def check(requests: Sequence[Fit]) -> None:
        """Raise `NotStackable` if networks or teachers cannot be stacked."""
        how, pixels = requests[0].how, requests[0].job.pixels
        how.network.check([each.weights for each in requests], pixels)
        for network, weights in zip(how.teachers, zip(*(each.teachers for each in requests), strict=True), strict=True):
            network.check(weights, pixels)

    @staticmethod
    def load(requests: Sequence[Fit], own: Stack, networks: Sequence[nn.Module]) -> None:
        """Copy the weights of all into the network and the teachers of a stack."""
        weights = zip(*((each.weights, *each.teachers) for each in requests), strict=True)
        for network, values in zip(networks, weights, strict=True):
            own.load(network, values)

    @staticmethod
    def stacked(requests: Sequence[Fit]) -> list[Any]:
        """The results of many; raises any exception of one of them."""
        Fit.check(requests)
        how = requests[0].how
        learner = how.learner(len(requests))
        networks = how.networks(learner.network)
        Fit.load(requests, learner.stack, networks)
        how.stacked(learner, [each.job for each in requests], requests[0].rates, how.learner)
        return learner.stack.weights(networks[0])


@dataclass(frozen=True, eq=False)
class TaughtFit(Fit):
    """The same with loss terms; ``taught`` makes the objective from the modules of student and teachers.

    The result is a pair: the weights, and those of the adapters of the objective.
    """

    taught: Callable[[nn.Module, Sequence[nn.Module]], DistillationObjective] = field(kw_only=True)

    def alone(self) -> Any:
        teachers = self._teachers()
        module = self.network.loaded(self.weights)
        both = self.taught(module, teachers)
        self.how.alone(both, replace(self.job, objective=both.loss), self.rates)
        return loop.weights_of(module), loop.weights_of(both.terms)

    @staticmethod
    def stacked(requests: Sequence[TaughtFit]) -> list[Any]:  # type: ignore[override]
        from fedkd.training.terms.objective import Taught, adapted_losses

        Fit.check(requests)
        how, own = requests[0].how, requests[0]._teachers()
        both = [each.taught(how.network.module, own) for each in requests]

        def built(count: int) -> Learner:
            stack = Stack(count, how.network.precision)
            networks = [how.network.stacked(stack), *how.stacked_teachers(stack)]
            adapters = stack.add_parameters([each.terms.parameters() for each in both[:count]])
            watched = zip(networks, (both[0].student, *both[0].teachers), strict=True)
            student, *teachers = (WatchedModel(network, alike.names) for network, alike in watched)
            return how.around(Taught(student, teachers, adapters), stack)

        learner = built(len(requests))
        taught = cast(Taught, learner.network)
        networks = [_within(each) for each in (taught.student, *taught.teachers)]
        Fit.load(requests, learner.stack, networks)
        losses = adapted_losses(both)
        jobs = [replace(each.job, objective=loss) for each, loss in zip(requests, losses, strict=True)]
        how.stacked(learner, jobs, requests[0].rates, built)
        for k, each in enumerate(both):
            for parameter, trained in zip(each.terms.parameters(), taught.adapters, strict=True):
                parameter.data = trained.detach()[k]
        weights = learner.stack.weights(networks[0])
        return [(mine, loop.weights_of(each.terms)) for mine, each in zip(weights, both, strict=True)]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a client's network returns for images; ``output`` is a module around it, if any."""

    network: Network
    scaling: Scaling | Callable[[Tensor], Tensor]
    weights: Tensors
    pixels: Tensor
    output: type[nn.Module] | None = None

    @property
    def key(self) -> Hashable:
        return self.network, self.scaling, self.output, self.pixels.shape[1:]

    def room(self) -> int:
        """How many clients fit into the memory of the GPU; the number of images at once does not depend on it."""
        return max(1, graphs.memory(self.network.device) // (2 * bytes_of(self.network, *self.pixels.shape[1:3])[0]))

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
