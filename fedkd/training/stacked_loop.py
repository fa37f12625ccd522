"""The training loop and prediction of a stack of clients: what `fedkd.training.loop` does for each of them.

Clients have different numbers of samples, so that a batch may be smaller than another client's, and a client may be
done before another. Batches are padded to the longest; losses and BatchNorm leave the padding out. What steps do to a
client that is done does not count; once enough clients are done, they leave the stack.

No step waits for a GPU: which samples are in its batch, and how they are augmented, is drawn before the first one, by
the generators of the plain loop. A step that does the same for every batch is recorded as a CUDA graph, after a first
one that is not. Training again with the same network, step and shapes (with new weights and state copied into their
tensors) replays the graph from the start.

Two runs of the same stack give the same bits. The last bits of a client's result depend on the number of clients in its
stack and on their batch sizes, by which PyTorch's kernels choose in which order they add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from fedkd.core import notes
from fedkd.data import augment
from fedkd.training import graphs, loop
from fedkd.training.loop import Augmentation, Objective, Penalty
from fedkd.training.losses import logits
from fedkd.training.optimizers import Step
from fedkd.training.stack import NotStackable, Stack

DONE = 0.25  # clients that are done leave the stack when they are this share of it


def _by_sample(objective: Objective) -> Objective:
    """The losses [B] of the samples, each a batch of its own."""
    return lambda output, targets: torch.vmap(objective)(output[:, None], targets[:, None])


#: The objectives that are means over samples, so that one call serves all clients: the losses [B] of the samples.
SAMPLE_LOSSES: dict[Objective, Objective] = {
    F.cross_entropy: partial(F.cross_entropy, reduction="none"),
    **{each: _by_sample(each) for each in (logits.cross_entropy, logits.kl, logits.logit_mae, logits.logit_mse)},
}


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

    def shares(self) -> Tensor:
        """The weight of each sample in the mean of its client [S, K, B]; of padding zero."""
        longest = self.samples.shape[-1]
        sizes = self.sizes[..., None]
        return (torch.arange(longest) < sizes) / sizes.clamp_min(1).double()

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
    record: bool = True,
) -> None:
    """Do the jobs of all clients, in place, with the results of `loop.train` up to rounding.

    ``step`` updates the parameters of ``network`` and ``state``, its other tensors [K, ...]. With ``record`` it is
    recorded on a GPU, with the rest of a training step, so each call must do the same.

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
    steps: Iterator[None] | None = None
    with stack.computing():
        for working, numbers in plan.segments():
            if len(working) <= (1 - DONE) * len(clients):
                _keep(stack, state, [clients.index(client) for client in working])
                clients, steps = working, None
            if steps is None:
                rest = plan.part(range(numbers[0], len(plan.sizes)), clients)
                steps = _steps(network, stack, step, [jobs[client] for client in clients], data, scaling, rest, record)
            for number in numbers:
                next(steps)
                if number == 0 and not torch.equal(random, _random_state(device)):
                    raise NotStackable("it draws random numbers in training")
                if average:
                    _add(stack, sums, [client for client in working if (number + 1) % len(sizes[client]) == 0], clients)
            _write(stack, results, working, clients)
    if average:
        results = [
            (total / epochs).to(result) if result.is_floating_point() else result
            for total, result in zip(sums, results, strict=True)
        ]
    for tensor, result in zip(stack.tensors, results, strict=True):
        if stack.count == len(jobs):
            tensor.detach().copy_(result)  # in place: a recorded step writes there
        else:
            tensor.data, stack.recording = result, None
    stack.count = len(jobs)


def _add(stack: Stack, sums: Sequence[Tensor], ended: list[int], clients: list[int]) -> None:
    """Add the tensors of those that have ended an epoch to their sums; ``clients`` are those in the stack."""
    for total, tensor in zip(sums, stack.tensors, strict=True):
        for client in ended:
            total[client] += tensor.detach()[clients.index(client)]


def _write(stack: Stack, results: Sequence[Tensor], working: list[int], clients: list[int]) -> None:
    """Write the tensors of those that work to their places in the results; ``clients`` are those in the stack."""
    for tensor, result in zip(stack.tensors, results, strict=True):
        if len(working) == len(result):
            result.copy_(tensor.detach())
        else:
            result[working] = tensor.detach()[[clients.index(client) for client in working]]


def _steps(
    network: nn.Module,
    stack: Stack,
    step: Step,
    jobs: Sequence[Job],
    data: Sequence[Tensor],
    scaling: Callable[[Tensor], Tensor],
    plan: Plan,
    record: bool,
) -> Iterator[None]:
    """Train on the batches of a plan, one at each request. Nothing in a step waits for the device.

    A step finds its batch by a number on the device, so that it can be recorded once and replayed without the host.
    """
    device, is_augmented = data[0].device, any(job.augmentation.crop for job in jobs)
    objective = _sample_loss(jobs)
    parts = plan.samples.flatten(1), plan.draws.flatten(2).transpose(0, 1), plan.is_real(), plan.shares()
    inputs = [*data, *(part.to(device) for part in parts), torch.zeros(1, dtype=torch.int64, device=device)]
    key: tuple[object, ...] = (
        network,
        step,
        objective,
        scaling,
        is_augmented,
        stack.precision,
        *(job.penalty for job in jobs),
    )
    key = (*key, *((tensor.shape, tensor.dtype) for tensor in inputs))
    recording = stack.recording if record and stack.recording and stack.recording.key == key else None
    if recording is not None:
        for kept, tensor in zip(recording.inputs, inputs, strict=True):
            kept.copy_(tensor)

    def run() -> None:
        pixels, targets, *batches, number = inputs
        samples, draws, stack.is_real, shares = (part.index_select(0, number)[0] for part in batches)
        images = pixels[samples]
        x = scaling(augment.apply(images, draws) if is_augmented else images)
        _loss(network, stack, jobs, objective, shares, x, targets[samples]).backward()  # type: ignore[no-untyped-call]
        step()
        number += 1

    is_recordable = record and objective is not None and _is_always_the_same(network, jobs)
    recorder = graphs.recorder(device) if is_recordable else None
    for done, sizes in enumerate(plan.sizes.tolist()):
        stack.sizes = sizes
        if recording is None and recorder is not None and 0 < done < len(plan.sizes) - 1:  # the first one is a warm-up
            stack.recording = None
            try:
                recording = stack.recording = graphs.Recording(key, inputs, recorder(run))
            except RuntimeError as error:
                reason, recorder = str(error).split("\n")[0], None
                notes.say(f"A training step cannot be recorded as a CUDA graph, so it is slower: {reason}")
                for parameter in network.parameters():
                    parameter.grad = None
        run() if recording is None else recording.replay()
        for job, size in zip(jobs, sizes, strict=True):
            if job.step is not None and size:
                job.step()
        yield


def _is_always_the_same(network: nn.Module, jobs: Sequence[Job]) -> bool:
    """Whether a step does the same in Python whatever its batch is."""
    has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in network.modules())
    return not has_dropout and all(job.step is None for job in jobs)


def _sample_loss(jobs: Sequence[Job]) -> Objective | None:
    """If all jobs have the same objective, and this is a mean over samples: the losses [B] of the samples."""
    found = (losses for mean, losses in SAMPLE_LOSSES.items() if all(job.objective is mean for job in jobs))
    return next(found, None)


def _loss(
    network: nn.Module,
    stack: Stack,
    jobs: Sequence[Job],
    objective: Objective | None,
    shares: Tensor,
    x: Tensor,
    targets: Tensor,
) -> Tensor:
    """The sum of the losses of the clients, each on its own samples; ``objective`` is their `_sample_loss`."""
    outputs, form = pytree.tree_flatten(network(x))
    outputs = [output.float() if output.dtype == torch.bfloat16 else output for output in outputs]
    losses = []
    if objective is not None:
        each = objective(pytree.tree_unflatten(outputs, form), targets)
        losses.append((each * shares.flatten().to(each)).sum())
    else:
        padding = [len(targets) // stack.count - size for size in stack.sizes]
        parts = [part for pair in zip(stack.sizes, padding, strict=True) for part in pair]
        rows = [tensor.split(parts)[::2] for tensor in (*outputs, targets)]  # whose gradient is one concatenation
    has_penalty = any(job.penalty for job in jobs)
    parameters = {name: tensor.unbind() for name, tensor in network.named_parameters()} if has_penalty else {}
    for k, (job, size) in enumerate(zip(jobs, stack.sizes, strict=True)):
        if size and objective is None:
            *output, wanted = (each[k] for each in rows)
            losses.append(job.objective(pytree.tree_unflatten(output, form), wanted))
        if job.penalty is not None:
            losses.append(job.penalty({name: each[k] for name, each in parameters.items()}))
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _keep(stack: Stack, state: Sequence[Tensor], places: list[int]) -> None:
    """Remove all other clients from a stack."""
    stack.count, stack.streams, stack.recording = len(places), [stack.streams[place] for place in places], None
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
    with torch.inference_mode(), stack.computing():
        for start in range(0, longest, chunk):
            images = [each[start : start + chunk] for each in pixels[: 1 if is_shared else None]]
            rows = nn.utils.rnn.pad_sequence(images, batch_first=True).to(device)
            x = scaling(rows.expand(stack.count, *rows.shape[1:]).flatten(0, 1))
            parts.append(stack.split(network(x)).float())
        outputs = torch.cat(parts, 1).cpu()
    return [output[: len(each)].clone() for output, each in zip(outputs, pixels, strict=True)]
