"""The training loop and prediction of a stack of clients: what `fedkd.training.loop` does for each of them.

Clients have different numbers of samples, so that a batch may be smaller than another client's, and a client may be
done before another. Batches are padded to the longest; losses and BatchNorm leave the padding out. What steps do to a
client that is done does not count; once enough clients are done, they leave the stack.

No step waits for a GPU: which samples are in its batch, and how they are augmented, is drawn before the first one, by
the generators of the plain loop.

Two runs of the same stack give the same bits. The last bits of a client's result depend on the number of clients in its
stack and on their batch sizes, by which PyTorch's kernels choose in which order they add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedkd.data import augment
from fedkd.training import loop
from fedkd.training.loop import Augmentation, Objective, Penalty
from fedkd.training.optimizers import Step
from fedkd.training.stack import NotStackable, Stack

DONE = 0.25  # clients that are done leave the stack when they are this share of it


@dataclass(frozen=True)
class Job:
    """What one client trains on, as for `loop.train`; ``step`` updates the parameters of its objective, if any."""

    pixels: Tensor
    targets: Tensor
    objective: Objective
    augmentation: Augmentation
    seed: int
    penalty: Penalty | None = None
    step: Step | None = None


@dataclass(frozen=True)
class Plan:
    """The batches of S steps of K clients: their sizes [S, K], their samples [S, K, B] and `augment.draw` [3, S, K, B].

    Samples are counted through the clients. A client that is done has a size of zero. Padding is the first of all
    samples, not augmented.
    """

    sizes: Tensor
    samples: Tensor
    draws: Tensor

    @staticmethod
    def of(jobs: Sequence[Job], sizes: Sequence[Sequence[int]], epochs: int) -> Plan:
        """The batches that `loop.train` makes of each job; ``sizes`` are those of its epoch."""
        shape = (epochs * max(map(len, sizes)), len(jobs), max(map(max, filter(None, sizes)), default=0))
        plan = Plan(
            torch.zeros(shape[:2], dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            augment.unchanged(1).repeat(1, shape[0] * shape[1] * shape[2]).view(3, *shape),
        )
        first = 0
        for k, job in enumerate(jobs):
            generator = torch.Generator().manual_seed(job.seed)
            order = (batch for _ in range(epochs) for batch in loop.batches(list(sizes[k]), generator))
            for number, batch in enumerate(order):
                size = plan.sizes[number, k] = len(batch)
                plan.samples[number, k, :size] = first + batch
                plan.draws[:, number, k, :size] = job.augmentation.draw(batch, generator)
            first += len(job.pixels)
        return plan

    def segments(self) -> list[tuple[list[int], list[int]]]:
        """Runs of steps with the same clients: these clients, and the numbers of the steps."""
        runs = groupby(range(len(self.sizes)), lambda number: self.sizes[number].nonzero().flatten().tolist())
        return [(clients, list(steps)) for clients, steps in runs]

    def part(self, steps: Sequence[int], clients: Sequence[int]) -> Plan:
        """The plan of these steps and clients."""
        sizes = self.sizes[steps][:, clients]
        longest = int(sizes.max())
        return Plan(sizes, self.samples[steps][:, clients, :longest], self.draws[:, steps][:, :, clients, :longest])

    def is_real(self) -> Tensor:
        """Which samples are no padding [S, K, B]. For a client that is done, all of them: it needs some statistics."""
        longest = self.samples.shape[-1]
        return torch.arange(longest) < torch.where(self.sizes > 0, self.sizes, longest)[..., None]


def train(
    network: nn.Module,
    stack: Stack,
    step: Step,
    state: Sequence[Tensor],
    jobs: Sequence[Job],
    scaling: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    average: bool = False,
) -> None:
    """Do the jobs of all clients, in place, with the results of `loop.train` up to rounding.

    ``step`` updates the parameters of ``network`` and ``state``, its other tensors [K, ...].

    Raises:
        NotStackable: the network or an objective draws random numbers. The jobs cannot be used again.

    """
    device = next(network.parameters()).device
    data = [torch.cat(list(each)).to(device) for each in zip(*((job.pixels, job.targets) for job in jobs), strict=True)]
    sizes = [loop.batch_sizes(network, len(job.pixels), batch_size) for job in jobs]
    plan = Plan.of(jobs, sizes, epochs)
    stack.streams = [torch.Generator(device).manual_seed(job.seed) for job in jobs]
    results = [tensor.detach().clone() for tensor in stack.tensors]
    sums = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in results] if average else []
    clients = list(range(len(jobs)))  # those in the stack, some of which may be done
    random = _random_state(device)
    network.train()
    for working, numbers in plan.segments():
        if len(working) <= (1 - DONE) * len(clients):
            _keep(stack, state, [clients.index(client) for client in working])
            clients = working
        batches = plan.part(numbers, clients)
        steps = _steps(network, stack, step, [jobs[client] for client in clients], data, scaling, batches)
        for number, _ in zip(numbers, steps, strict=True):
            if number == 0 and not torch.equal(random, _random_state(device)):
                raise NotStackable("it draws random numbers in training")
            for client in working if average else ():
                if (number + 1) % len(sizes[client]) == 0:
                    for total, tensor in zip(sums, stack.tensors, strict=True):
                        total[client] += tensor.detach()[clients.index(client)]
        for tensor, result in zip(stack.tensors, results, strict=True):
            result[working] = tensor.detach()[[clients.index(client) for client in working]]
    stack.count = len(jobs)
    for place, (tensor, result) in enumerate(zip(stack.tensors, results, strict=True)):
        tensor.data = (sums[place] / epochs).to(result) if average and result.is_floating_point() else result


def _steps(
    network: nn.Module,
    stack: Stack,
    step: Step,
    jobs: Sequence[Job],
    data: Sequence[Tensor],
    scaling: Callable[[Tensor], Tensor],
    plan: Plan,
) -> Iterator[None]:
    """Train on the batches of a plan, one at each request. Nothing in a step waits for the device."""
    (pixels, targets), device = data, data[0].device
    samples, draws, is_real = (t.to(device) for t in (plan.samples.flatten(1), plan.draws.flatten(2), plan.is_real()))
    is_augmented = any(job.augmentation.crop for job in jobs)
    for number, sizes in enumerate(plan.sizes.tolist()):
        stack.sizes, stack.is_real = sizes, is_real[number]
        images = pixels[samples[number]]
        images = augment.apply(images, draws[:, number]) if is_augmented else images
        _loss(network, stack, jobs, scaling(images), targets[samples[number]]).backward()  # type: ignore[no-untyped-call]
        step()
        for job, size in zip(jobs, sizes, strict=True):
            if job.step is not None and size:
                job.step()
        yield


def _loss(network: nn.Module, stack: Stack, jobs: Sequence[Job], x: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of the clients, each on its own samples."""
    outputs, form = pytree.tree_flatten(network(x))
    padding = [len(targets) // stack.count - size for size in stack.sizes]
    parts = [part for pair in zip(stack.sizes, padding, strict=True) for part in pair]
    rows = [tensor.split(parts)[::2] for tensor in (*outputs, targets)]  # whose gradient is one concatenation
    has_penalty = any(job.penalty for job in jobs)
    parameters = {name: tensor.unbind() for name, tensor in network.named_parameters()} if has_penalty else {}
    losses = []
    for k, (job, size) in enumerate(zip(jobs, stack.sizes, strict=True)):
        if size:
            *output, wanted = (each[k] for each in rows)
            losses.append(job.objective(pytree.tree_unflatten(output, form), wanted))
            if job.penalty is not None:
                losses.append(job.penalty({name: each[k] for name, each in parameters.items()}))
    return torch.stack(losses).sum()


def _keep(stack: Stack, state: Sequence[Tensor], places: list[int]) -> None:
    """Remove all other clients from a stack."""
    stack.count, stack.streams = len(places), [stack.streams[place] for place in places]
    for tensor in (*stack.tensors, *state):
        tensor.data = tensor.detach()[places]


def _random_state(device: torch.device) -> Tensor:
    """The state of torch's own random numbers."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def predict(
    network: nn.Module, stack: Stack, pixels: Sequence[Tensor], scaling: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """What `loop.predict` returns for each client and its images; the same tensor for all clients is uploaded once."""
    device = next(network.parameters()).device
    chunk = max(1, (loop.CPU_CHUNK if device.type == "cpu" else loop.GPU_CHUNK) // stack.count)
    is_shared = all(each is pixels[0] for each in pixels)
    longest = max(map(len, pixels))
    parts = []
    network.eval()
    with torch.inference_mode():
        for start in range(0, longest, chunk):
            images = [each[start : start + chunk] for each in pixels[: 1 if is_shared else None]]
            rows = nn.utils.rnn.pad_sequence(images, batch_first=True).to(device)
            x = scaling(rows.expand(stack.count, *rows.shape[1:]).flatten(0, 1))
            parts.append(stack.split(network(x)).cpu())
        outputs = torch.cat(parts, 1).float()
    return [output[: len(each)].clone() for output, each in zip(outputs, pixels, strict=True)]
