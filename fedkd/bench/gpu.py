"""Local training of many clients on one GPU: implementations, each compared with the plain loop.

    python -m fedkd.bench.gpu --model resnet8 --clients 20 --images 512

With small models a GPU waits for Python: a step with a batch of 32 has about ninety kernels of a few
microseconds. Two remedies are to capture a step once and replay it (CUDA graphs), and to train all
clients in the same kernels (`torch.func.vmap`). The engine uses the plain loop, `fedkd.training.loop.train`.
It is also the oracle: the weights of each implementation must equal its weights up to rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
from cyclopts import App, Parameter
from cyclopts.validators import Number
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedkd import models
from fedkd.core import cli, seeds
from fedkd.data.scaling import Scaling
from fedkd.training import loop, optimizers

Weights = dict[str, Tensor]  # of all clients: each tensor has a first dimension [clients]
RATE, MOMENTUM, DECAY, BATCH = 0.01, 0.9, 0.0005, 32
SCALING = Scaling((127.5, 127.5, 127.5), (64.0, 64.0, 64.0))


@dataclass(frozen=True, eq=False)
class Job:
    """One local epoch of clients with N images each: pixels [K, N, H, W, 3], labels [K, N], one model."""

    module: nn.Module
    pixels: Tensor
    labels: Tensor

    @staticmethod
    def of(model: str, clients: int, images: int, device: str) -> Job:
        """Random images, labels and initial weights."""
        generator = seeds.generator(0, "gpu")
        pixels = torch.randint(256, (clients, images, 32, 32, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (clients, images), generator=generator)
        with seeds.seeded(0):
            module = models.build(model, 10, "group")
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Job(module, pixels.to(device), labels.to(device))

    def batches(self) -> Iterator[Tensor]:
        """The indices of every client's next batch [K, B], in the order of the plain loop."""
        clients, images = self.labels.shape
        sizes = loop.batch_sizes(self.module, images, BATCH)
        orders = [loop.batches(sizes, torch.Generator().manual_seed(k)) for k in range(clients)]
        for rows in zip(*orders, strict=True):
            yield torch.stack(rows).to(self.labels.device)


def plain(job: Job) -> Weights:
    """One client after the other, as in the engine."""
    start = {name: value.clone() for name, value in job.module.state_dict().items()}
    results = []
    for client, (pixels, labels) in enumerate(zip(job.pixels, job.labels, strict=True)):
        job.module.load_state_dict(start)
        optimizer = optimizers.sgd(list(job.module.parameters()), RATE, MOMENTUM, DECAY)
        loss, none = nn.functional.cross_entropy, loop.Augmentation()
        loop.train(
            job.module,
            optimizer,
            pixels,
            labels,
            loss,
            SCALING,
            epochs=1,
            batch_size=BATCH,
            augmentation=none,
            seed=client,
        )
        results.append({name: value.clone() for name, value in job.module.state_dict().items()})
    job.module.load_state_dict(start)
    return {name: torch.stack([weights[name] for weights in results]) for name in start}


def stacked(job: Job, half: bool = False, captured: bool = False) -> Weights:
    """All clients in the same kernels; with ``half`` in bfloat16, ``captured`` as a replayed CUDA graph."""
    clients = len(job.pixels)
    weights = {n: p.detach().expand(clients, *p.shape).clone() for n, p in job.module.named_parameters()}
    velocities = {name: torch.zeros_like(value) for name, value in weights.items()}
    numbers = torch.arange(clients, device=job.labels.device)[:, None]

    def loss(client_weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16) if half else nullcontext():
            logits = functional_call(job.module, client_weights, (images,))
        return nn.functional.cross_entropy(logits.float(), labels)

    gradients = vmap(grad(loss))

    def step(rows: Tensor) -> None:
        pixels, labels = job.pixels[numbers, rows], job.labels[numbers, rows]
        images = SCALING(pixels.flatten(0, 1)).view(*pixels.shape[:2], 3, *pixels.shape[2:4])
        for name, gradient in gradients(weights, images, labels).items():
            velocities[name].mul_(MOMENTUM).add_(gradient).add_(weights[name], alpha=DECAY)
            weights[name].sub_(velocities[name], alpha=RATE)

    job.module.train()
    orders = list(job.batches())
    run = _captured(step, orders[0], [*weights.values(), *velocities.values()]) if captured else step
    for rows in orders:
        run(rows)
    return weights


def graphed(job: Job) -> Weights:
    """One client after the other, with a step that is captured once and replayed for all of them."""
    start = {name: value.clone() for name, value in job.module.state_dict().items()}
    parameters = list(job.module.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    # One element: an index without a dimension would be copied to the host, which cannot be captured.
    client = torch.zeros(1, dtype=torch.int64, device=job.labels.device)

    def step(rows: Tensor) -> None:
        pixels, labels = job.pixels[client, rows[0]], job.labels[client, rows[0]]
        gradients = torch.autograd.grad(nn.functional.cross_entropy(job.module(SCALING(pixels)), labels), parameters)
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient).add_(parameter, alpha=DECAY)
                parameter.sub_(velocity, alpha=RATE)

    job.module.train()
    orders = torch.stack(list(job.batches()), 1)  # [K, steps, B]
    replay = _captured(step, orders[0, :1], [*parameters, *velocities])
    results = []
    for number, order in enumerate(orders):
        job.module.load_state_dict(start)
        client.fill_(number)
        for velocity in velocities:
            velocity.zero_()
        for rows in order:
            replay(rows[None])
        results.append({name: value.clone() for name, value in job.module.state_dict().items()})
    job.module.load_state_dict(start)
    return {name: torch.stack([weights[name] for weights in results]) for name in start}


def _captured(step: Callable[[Tensor], None], rows: Tensor, changed: list[Tensor]) -> Callable[[Tensor], None]:
    """The step as a CUDA graph. The tensors ``changed`` by warm-up and capture are restored."""
    before = [tensor.detach().clone() for tensor in changed]
    static_rows, graph = rows.clone(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static_rows)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step(static_rows)
    with torch.no_grad():
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    def replay(rows: Tensor) -> None:
        static_rows.copy_(rows)
        graph.replay()

    return replay


IMPLEMENTATIONS: dict[str, Callable[[Job], Weights]] = {
    "plain": plain,
    "graphed": graphed,
    "stacked": stacked,
    "stacked, graphed": lambda job: stacked(job, captured=True),
    "stacked, graphed, bfloat16": lambda job: stacked(job, half=True, captured=True),
}

app = App(name="python -m fedkd.bench.gpu", result_action="return_value", help_format="plaintext", version_flags=[])


@app.default
def measure(
    *,
    model: Annotated[str, Parameter(help="The clients' model.")] = "cnn",
    clients: Annotated[int, Parameter(help="Clients.", validator=Number(gte=1))] = 20,
    images: Annotated[
        int, Parameter(help="Images of each client; a multiple of 32.", validator=Number(gte=32, modulo=32))
    ] = 512,
    repeats: Annotated[
        int, Parameter(help="Timed runs of each implementation, in alternation.", validator=Number(gte=1))
    ] = 5,
    device: Annotated[str, Parameter(help="cuda; on a CPU only the implementations without a graph are run.")] = "cuda",
) -> None:
    """Time each implementation of training many clients on a GPU, and print a JSON object."""
    from fedkd.core.runtime import device as resolve_device

    job = Job.of(model, clients, images, resolve_device(device))
    on_gpu = job.labels.device.type == "cuda"
    selected = {name: train for name, train in IMPLEMENTATIONS.items() if on_gpu or "graphed" not in name}
    oracle = plain(job)
    results: dict[str, dict[str, float]] = {}
    for name, train in selected.items():
        weights = train(job)
        results[name] = {"difference": max((weights[n] - oracle[n]).abs().max().item() for n in weights)}
    seconds: dict[str, list[float]] = {name: [] for name in selected}
    for _ in range(repeats):
        for name, train in selected.items():
            start = time.perf_counter()
            train(job)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        results[name]["images_per_second"] = clients * images / median(times)
    name = torch.cuda.get_device_name(job.labels.device) if on_gpu else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "model": model, "ways": results}, indent=2))


if __name__ == "__main__":
    cli.run(app)
