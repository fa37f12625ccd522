"""The losses of a stack of clients: one call for all of them if they have the same objective and the same penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedkd.training.objectives import Bound, function_of, of_samples, on_device
from fedkd.training.stack import NotStackable, Stack
from fedkd.training.terms.objective import Taught

if TYPE_CHECKING:
    from fedkd.training.loop import Objective, Penalty


@dataclass(frozen=True)
class _Shared:
    """An objective or a penalty of all clients; ``bound`` holds its tensors [K, ...], if it has any."""

    function: Callable[..., Tensor]
    bound: Sequence[Mapping[str, Tensor]]

    @staticmethod
    def of(functions: Sequence[Callable[..., Tensor] | None], device: torch.device) -> _Shared | None:
        """That of these clients, if they have the same one."""
        tensors = [each.tensors for each in functions if isinstance(each, Bound)]
        first, *others = map(function_of, functions)
        if first is None or len(tensors) not in (0, len(functions)) or any(other != first for other in others):
            return None
        names = tensors[0] if tensors else ()
        stacked = {name: torch.stack([each[name] for each in tensors]).to(device) for name in names}
        return _Shared(first, [stacked] if tensors else [])


@dataclass(frozen=True)
class Losses:
    """What clients minimize: their objectives, or the one of all, and a penalty, if they have one."""

    objectives: Sequence[Objective]
    objective: _Shared | None
    penalty: _Shared | None

    @staticmethod
    def of(objectives: Sequence[Objective], penalties: Sequence[Penalty | None], device: torch.device) -> Losses:
        """Of these clients.

        Raises:
            NotStackable: their penalties differ.

        """
        penalty = _Shared.of(penalties, device)
        if penalty is None and any(penalties):
            raise NotStackable("penalties of clients differ")
        return Losses(objectives, _Shared.of(objectives, device), penalty)

    @property
    def key(self) -> tuple[object, ...]:
        """What they have in common with others that compute the same with other `tensors`."""
        shared = [each for each in (self.objective, self.penalty) if each]
        return len(self.objectives), *((each.function, *map(tuple, each.bound)) for each in shared)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of clients that they use."""
        shared = [each for each in (self.objective, self.penalty) if each]
        return [tensor for each in shared for tensors in each.bound for tensor in tensors.values()]

    def are_one_call(self, sizes: Tensor) -> bool:
        """Whether they are computed by the same calls for batches of all of these sizes."""
        objective = self.objective
        return objective is not None and bool(sizes.min() == sizes.max() or of_samples(objective.function))

    def total(self, network: nn.Module, stack: Stack, shares: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        """Their sum, each on its client's own samples; ``shares`` [K, B] are the weights of the samples.

        If clients share an objective, one call computes all of them where it is a mean over samples, or where their
        batches have one size. What this adds for clients that are done does not count. With a teacher, an objective
        also gets the adapters of its client.
        """
        if stack.is_plain and self.objective and not self.objective.bound and not self.penalty:  # as in `loop.train`
            return self.objective.function(stack.output_of(network, x), targets)
        outputs, form = pytree.tree_flatten(stack.output_of(network, x))
        outputs = [output.float() if output.dtype == torch.bfloat16 else output for output in outputs]
        adapters = [list(network.adapters)] if isinstance(network, Taught) else []
        total = self._of_all(stack, shares, pytree.tree_unflatten(outputs, form), targets, adapters)
        if total is None:
            padding = [len(targets) // stack.count - size for size in stack.sizes]
            parts = [part for pair in zip(stack.sizes, padding, strict=True) for part in pair]
            # Split at once, so that the gradient is one concatenation.
            rows = zip(*(tensor.split(parts)[::2] for tensor in (*outputs, targets)), strict=True)
            total = torch.stack(
                [
                    on_device(objective, x.device)(
                        pytree.tree_unflatten(output, form), wanted, *([each[k] for each in own] for own in adapters)
                    )
                    for k, (objective, (*output, wanted)) in enumerate(zip(self.objectives, rows, strict=True))
                    if len(wanted)
                ]
            ).sum()
        if self.penalty:
            parameters = {name: stack.of_clients(parameter) for name, parameter in network.named_parameters()}
            total = total + torch.vmap(self.penalty.function)(parameters, *self.penalty.bound).sum()
        return total

    def _of_all(
        self, stack: Stack, shares: Tensor, output: Any, targets: Tensor, adapters: Sequence[Sequence[Tensor]]
    ) -> Tensor | None:
        """The sum of the objectives by one call, if there is one for all."""
        if self.objective is None:
            return None
        function, bound = self.objective.function, [*self.objective.bound, *adapters]
        each, rows = of_samples(function), pytree.tree_map(stack.split, (output, targets))
        if each:
            losses = torch.vmap(each)(*rows, *bound).flatten() if bound else each(output, targets)
            return (losses * shares.flatten().to(losses)).sum()
        if len(set(stack.sizes) - {0}) == 1:
            rows = pytree.tree_map(lambda tensor: tensor[:, : max(stack.sizes)], rows)
            with suppress(RuntimeError):  # of functions that `vmap` refuses
                return torch.vmap(function)(*rows, *bound).sum()
        return None
