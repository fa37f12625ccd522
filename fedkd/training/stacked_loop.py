"""The training loop and prediction of a stack of clients: what `fedkd.training.loop` does for each of them.

Clients have different numbers of samples, so that a batch may be smaller than another client's, and a client may be
done before another. Batches are padded to the longest; losses and BatchNorm leave the padding out. What steps do to a
client that is done does not count; once enough clients are done, the others go on in a smaller stack.

No step waits for a GPU: which samples are in its batch, and how they are augmented, is drawn before the first one, by
the generators of the plain loop. A step that does the same for every batch is recorded as a CUDA graph after its first
run, and replayed from then on, also in later trainings of the same learner.

Two runs of the same stack give the same bits. The last bits of a client's result depend on the number of clients in its
stack and on their batch sizes, by which PyTorch's kernels choose in which order they add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import notes
from fedkd.core.seeds import seeded
from fedkd.data import augment
from fedkd.training import graphs, loop, optimizers
from fedkd.training.batches import Job, Plan
from fedkd.training.early_stopping import Best, mean_after
from fedkd.training.graphs import Recording
from fedkd.training.stack import NotStackable, Stack
from fedkd.training.stacked_losses import Losses

if TYPE_CHECKING:
    from fedkd.training.optimizers import Step

#: How many clients a stack may have after some have left it: each size is about three quarters of the next one.
SIZES = (2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48)
MOST = 8  # recorded steps of a learner; they differ in the width of a batch, the objective and the like


@dataclass(eq=False)
class Learner:
    """A network of the clients of a stack, and what its training keeps between steps.

    ``step`` updates its parameters and ``state`` at a learning rate, a tensor. The state are tensors [K, ...] or, if
    they count steps, without dimensions.
    ``recordings`` are the last recorded steps, by what they hold for; None for a step that has been run, as a step must
    before it can be recorded.
    """

    network: nn.Module
    stack: Stack
    step: Step
    state: Sequence[Tensor]
    recordings: dict[object, Recording | None] = field(default_factory=dict)
    is_recordable: bool = True

    def take(self, other: Learner, places: Sequence[int]) -> None:
        """Go on with the clients at these places of another learner."""
        mine, theirs = ([*each.stack.tensors, *each.state] for each in (self, other))
        for tensor, old in zip(mine, theirs, strict=True):
            tensor.detach().copy_(old.detach()[places] if old.dim() else old)
        self.stack.streams = [other.stack.streams[place] for place in places]

    def recording(self, key: object, steps: int) -> Recording | None:
        """The recorded step with this key, if it has room for the batches of so many steps."""
        found = self.recordings.get(key)
        return found if found and len(found.inputs[0]) >= steps else None

    def has_run(self, key: object) -> None:
        """Note that a step with this key can be recorded, and forget the oldest one."""
        if self.recordings.setdefault(key, None) is None and len(self.recordings) > MOST:
            del self.recordings[next(iter(self.recordings))]

    def record(
        self, key: object, inputs: Sequence[Tensor], recorded: Callable[[], Callable[[], None]]
    ) -> Recording | None:
        """Record a step; None if it cannot be recorded, which is said once."""
        try:
            self.recordings[key] = recording = Recording(inputs, recorded())
        except RuntimeError as error:
            self.is_recordable, reason = False, str(error).split("\n")[0]
            notes.say(f"A training step cannot be recorded as a CUDA graph, so it is slower: {reason}")
            self.network.zero_grad()
            return None
        return recording


def train(
    learner: Learner,
    jobs: Sequence[Job],
    scaling: Callable[[Tensor], Tensor],
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    steps: int = 0,
    average: bool = False,
    record: bool = True,
    smaller: Callable[[int], Learner] | None = None,
) -> None:
    """Do the jobs of all clients, in place, with the results of `loop.train` up to rounding.

    ``rates`` are the learning rates of the steps; the last one is that of all further steps. ``smaller`` gives a
    learner of fewer clients, with any weights; without it, clients that are done stay. With ``record`` a training step
    is recorded on a GPU.

    Raises:
        NotStackable: the network or an objective draws random numbers, or penalties differ.

    """
    device = next(learner.network.parameters()).device
    data = [graphs.upload([getattr(job, name) for job in jobs], device) for name in ("pixels", "targets")]
    sizes = [loop.batch_sizes(learner.network, len(job.pixels), batch_size) for job in jobs]
    lengths = [loop.epoch_lengths(len(each), epochs, steps) for each in sizes]
    plan = Plan.of(jobs, sizes, lengths)
    segments, rate_of_steps = plan.segments(), optimizers.rates_for(rates, len(plan.sizes), device)
    first, clients = learner, list(range(len(jobs)))  # those in the stack, some of which may be done
    learner.stack.streams = [torch.Generator(device).manual_seed(job.seed) for job in jobs]
    tensors = first.stack.tensors
    results = [] if [working for working, _ in segments] == [clients] else [each.detach().clone() for each in tensors]
    ends = [set(accumulate(filter(None, each))) for each in lengths]
    is_idle = torch.tensor([float(not any(each)) for each in lengths], dtype=torch.float64, device=device)
    sums = [each.detach() * is_idle.view(-1, *[1] * (each.dim() - 1)) for each in tensors] if average else []
    best = _best(learner, jobs[0], scaling, sums, ends[0], len(plan.sizes))
    each_step: Iterator[None] | None = None
    with learner.stack.computing(), seeded(jobs[0].seed):  # seeded as `loop.train` for one client
        random = _random_state(device)
        for (working, numbers), (later, _) in zip(segments, [*segments[1:], ([], [])], strict=False):
            count = min((size for size in SIZES if size >= len(working)), default=len(clients))
            if smaller is not None and count < len(clients):
                done = [client for client in clients if client not in working]
                remaining = sorted((working + done)[:count])
                old, learner, each_step = learner, smaller(count), None
                learner.take(old, [clients.index(client) for client in remaining])
                clients = remaining
            if each_step is None:
                own = [jobs[client] for client in clients]
                rest = plan.part(numbers[0], clients), rate_of_steps[numbers[0] :]
                each_step = _steps(learner, own, data, scaling, *rest, record)
            for number in numbers:
                next(each_step)
                if number == 0 and not torch.equal(random, _random_state(device)):
                    _drawn(learner)
                if average:
                    ended = [client for client in working if number + 1 in ends[client]]
                    _put(learner, clients, sums, ended, torch.Tensor.add_)
                if best and best.ends(number + 1):
                    break
            if results:
                _put(learner, clients, results, [c for c in working if c not in later], torch.Tensor.copy_)
    results = best.weights if best else _means(sums, results or tensors, lengths) if average else results
    for tensor, result in zip(tensors, results, strict=False):  # none if all is in its place
        tensor.detach().copy_(result)


def _best(
    learner: Learner,
    job: Job,
    scaling: Callable[[Tensor], Tensor],
    sums: Sequence[Tensor],
    ends: set[int],
    steps: int,
) -> Best | None:
    """The best weights of a single client, if its training may end early."""
    tensors = [tensor.detach() for tensor in learner.stack.tensors]

    def validate(images: Tensor) -> Tensor:
        (logits,) = predict(learner.network, learner.stack, [images], scaling)
        learner.network.train()
        return logits

    def result(number: int) -> Sequence[Tensor]:
        return mean_after(number, tensors, sums, ends) if sums else tensors

    return Best(job.stopping, tensors, steps, validate, result) if job.stopping else None


def _means(sums: Sequence[Tensor], tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]]) -> list[Tensor]:
    """The means [K, ...] over the epochs of each client, which have these numbers of batches; integers are the last."""
    epochs = torch.tensor([sum(map(bool, each)) or 1 for each in lengths], device=tensors[0].device)
    return [
        (total / epochs.view(-1, *[1] * (total.dim() - 1))).to(tensor) if tensor.is_floating_point() else tensor
        for total, tensor in zip(sums, tensors, strict=True)
    ]


def _drawn(learner: Learner) -> None:
    """Refuse a step that draws random numbers of torch's own; for one client they are those of `loop.train`."""
    if not learner.stack.is_plain:
        raise NotStackable("it draws random numbers in training")
    learner.is_recordable = False
    notes.say("A training step that draws random numbers is not recorded as a CUDA graph, so it is slower.")


def _put(
    learner: Learner,
    clients: list[int],
    results: Sequence[Tensor],
    ended: list[int],
    put: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Copy or add the tensors of those that have ended to their results; ``clients`` are those in the stack."""
    for tensor, result in zip(learner.stack.tensors, results, strict=True):
        for client in ended:
            put(result[client], tensor.detach()[clients.index(client)])


def _steps(
    learner: Learner,
    jobs: Sequence[Job],
    data: Sequence[Tensor],
    scaling: Callable[[Tensor], Tensor],
    plan: Plan,
    rates: Tensor,
    record: bool,
) -> Iterator[None]:
    """Train on the batches of a plan, one at each request. Nothing in a step waits for the device.

    A step finds its batch by a number on the device, so that it can be recorded once and replayed without the host.
    """
    network, stack, device = learner.network, learner.stack, data[0].device
    is_augmented = any(job.augmentation.crop for job in jobs)
    losses = Losses.of([job.objective for job in jobs], [job.penalty for job in jobs], device)
    usual = int(plan.sizes[0].max()) if stack.is_plain else plan.samples.shape[-1]
    parts = [plan.samples.flatten(1), plan.draws.flatten(2).transpose(0, 1), plan.is_real(), plan.shares()]
    parts += [rates, torch.zeros(1, dtype=torch.int64)]  # the last one is the number of the step
    key = (
        *(losses.key, scaling, is_augmented, usual),
        *((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in data),
        *((part.shape[1:], part.dtype) for part in (*parts, *losses.tensors)),
    )
    is_recordable = record and not _has_dropout(network) and (stack.is_plain or losses.are_one_call(plan.sizes))
    recorder = graphs.recorder(device) if is_recordable and learner.is_recordable else None
    recording = learner.recording(key, len(plan.sizes)) if recorder else None
    kept = recording.inputs if recording else graphs.inputs(parts, device, graphs.ROOM if recorder else 1)
    inputs = kept[: len(parts)]
    for tensor, part in zip(kept, (*parts, *losses.tensors), strict=False):
        tensor[: len(part)].copy_(part)

    def run(longest: int) -> None:
        *batches, number = inputs
        samples, draws, stack.is_real, shares, rate = (part.index_select(0, number)[0] for part in batches)
        if stack.is_plain:  # its layers know nothing of padding
            samples, draws, shares = samples[:longest], draws[:, :longest], shares[:, :longest]
        pixels, targets = data
        images = pixels[samples]
        x = scaling(augment.apply(images, draws) if is_augmented else images)
        losses.total(network, stack, shares, x, targets[samples]).backward()  # type: ignore[no-untyped-call]
        learner.step(rate)
        number.add_(1)

    network.train()
    network.zero_grad()  # of a training that failed
    for sizes in plan.sizes.tolist():
        stack.sizes = sizes
        longest = sizes[0] if stack.is_plain else usual
        if recording is None and recorder and learner.is_recordable and longest == usual and key in learner.recordings:
            recording = learner.record(key, [*inputs, *losses.tensors], partial(recorder, partial(run, usual)))
        if recording and longest == usual:
            recording.replay()
        else:
            run(longest)
            if longest == usual:
                learner.has_run(key)
        yield


def _has_dropout(network: nn.Module) -> bool:
    """Whether a step depends in Python on the sizes of its batches."""
    return any(isinstance(module, nn.Dropout) and module.p for module in network.modules())


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
            parts.append(stack.split(stack.output_of(network, x)).float())
        outputs = torch.cat(parts, 1).cpu()
    return [output[: len(each)].clone() for output, each in zip(outputs, pixels, strict=True)]
