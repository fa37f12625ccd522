"""Local training of many clients on one GPU: implementations, each compared with the plain loop, and a whole run.

    python -m fedkd.bench.gpu --model resnet8 cnn --clients 20 --images 512

With small models a GPU waits for Python: a step with a batch of 32 has about two hundred kernels of a few
microseconds. Two remedies are to record a step once and replay it (CUDA graphs), and to train all clients in the same
kernels (`fedkd.training.stacked_loop`). The plain loop, `fedkd.training.loop`, is the oracle: the weights of each
implementation must equal its weights up to rounding.

A whole run is FedAvg by `fedkd.simulate` with the same clients, images and model. What of its rounds is not training is
measured strictly: all that exceeds the time of the same training on its own, with a step that is recorded already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from cyclopts.validators import Number
from torch import Tensor, nn

from fedkd.bench import report, stacks
from fedkd.core import cli, seeds
from fedkd.data import augment
from fedkd.data.scaling import Scaling
from fedkd.training import graphs, loop, models, optimizers, stacked_loop
from fedkd.training.batches import Job, Plan
from fedkd.training.precision import Precision, resolve
from fedkd.training.stack import Stack
from fedkd.training.stacked_loop import Learner

Weights = dict[str, Tensor]  # of all clients: each tensor has a first dimension [clients]
RATE, MOMENTUM, DECAY, BATCH = 0.01, 0.9, 0.0005, 32
EPOCHS = 2  # of local training in the whole run
SCALING = Scaling((127.5, 127.5, 127.5), (64.0, 64.0, 64.0))


@dataclass(frozen=True, eq=False)
class Work:
    """One local epoch of clients that start from one model, and images to predict."""

    module: nn.Module
    jobs: list[Job]
    shared: Tensor

    @staticmethod
    def of(model: str, clients: int, images: int, shared: int, device: str) -> Work:
        """Random images, labels and initial weights."""
        generator = seeds.generator(0, "gpu")

        def pixels(count: int) -> Tensor:
            drawn = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
            return drawn.to(device)

        with seeds.seeded(0):
            module = models.build(model, 10, "group")
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss, augmentation = nn.functional.cross_entropy, loop.Augmentation(crop=True, flip=True)
        jobs = [
            Job(pixels(images), torch.randint(10, (images,), generator=generator).to(device), loss, augmentation, k)
            for k in range(clients)
        ]
        return Work(module, jobs, pixels(shared))

    @property
    def device(self) -> torch.device:
        """Where it is done."""
        return self.shared.device


class Plain:
    """One client after the other."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.start = {name: value.clone() for name, value in work.module.state_dict().items()}

    def train(self) -> Weights:
        """The weights of all clients."""
        module, results = self.work.module, []
        for job in self.work.jobs:
            module.load_state_dict(self.start)
            self.train_one(job)
            results.append({name: value.clone() for name, value in module.state_dict().items()})
        module.load_state_dict(self.start)
        return {name: torch.stack([weights[name] for weights in results]) for name in self.start}

    def train_one(self, job: Job) -> None:
        """Train the module, which has its initial weights."""
        loop.train(
            self.work.module,
            optimizers.sgd(list(self.work.module.parameters()), MOMENTUM, DECAY),
            job.pixels,
            job.targets,
            job.objective,
            SCALING,
            rates=[RATE],
            epochs=1,
            batch_size=BATCH,
            augmentation=job.augmentation,
            seed=job.seed,
        )

    def predict(self) -> None:
        """The logits of all clients."""
        for _ in self.work.jobs:
            loop.predict(self.work.module, self.work.shared, SCALING)


class Graphed(Plain):
    """One client after the other, with a step that is recorded once and replayed for all of them."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        parameters = list(work.module.parameters())
        self.velocities: list[Tensor | None] = [torch.zeros_like(p) for p in parameters]
        self.update = optimizers.sgd(parameters, MOMENTUM, DECAY, self.velocities)
        first = work.jobs[0]
        self.inputs = [torch.empty_like(first.pixels[:BATCH]), torch.empty_like(first.targets[:BATCH])]
        self.draws = torch.zeros(3, BATCH, dtype=torch.int64, device=work.device)
        self.replay: Callable[[], None] | None = None

    def step(self) -> None:
        """One step on the batch in the inputs."""
        pixels, targets = self.inputs
        logits = self.work.module(SCALING(augment.apply(pixels, self.draws)))
        nn.functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        self.update(RATE)

    def train_one(self, job: Job) -> None:
        self.work.module.train()
        if self.replay is None:
            self.inputs[1].zero_()
            self.step()
            self.replay = graphs.record(self.step, self.work.device)
            self.work.module.load_state_dict(self.start)
        for velocity in self.velocities:
            assert velocity is not None
            velocity.zero_()
        sizes = loop.batch_sizes(self.work.module, len(job.pixels), BATCH)
        plan = Plan.of([job], [sizes], [[len(sizes)]])
        samples, draws = plan.samples.to(self.work.device), plan.draws.to(self.work.device)
        for number in range(len(samples)):
            self.inputs[0].copy_(job.pixels[samples[number, 0]])
            self.inputs[1].copy_(job.targets[samples[number, 0]])
            self.draws.copy_(draws[:, number, 0])
            self.replay()


class Stacked:
    """All clients in the same kernels; with ``record`` as a CUDA graph, which later trainings replay if ``keep``."""

    def __init__(self, work: Work, precision: Precision = "float32", record: bool = True, keep: bool = True) -> None:
        self.work, self.record, self.keep = work, record, keep
        self.stack = Stack(len(work.jobs), precision)
        self.network = self.stack.add(work.module, [work.module.state_dict()] * len(work.jobs))
        self.start = [tensor.detach().clone() for tensor in self.stack.tensors]
        parameters = list(self.network.parameters())
        state = optimizers.state_of(optimizers.sgd, parameters)
        step = optimizers.sgd(parameters, MOMENTUM, DECAY, list(state))
        self.learner = Learner(self.network, self.stack, step, state)

    def train(self) -> Weights:
        """The weights of all clients."""
        for tensor, value in zip(self.stack.tensors, self.start, strict=True):
            tensor.detach().copy_(value)
        for velocity in self.learner.state:
            velocity.zero_()
        if not self.keep:
            self.learner.recordings.clear()
        options = {"rates": [RATE], "epochs": 1, "batch_size": BATCH, "record": self.record}
        stacked_loop.train(self.learner, self.work.jobs, SCALING, **options)  # type: ignore[arg-type]
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def predict(self) -> None:
        """The logits of all clients."""
        stacked_loop.predict(self.network, self.stack, [self.work.shared] * len(self.work.jobs), SCALING)


IMPLEMENTATIONS: dict[str, Callable[[Work], Plain | Stacked]] = {
    "plain": Plain,
    "graphed": Graphed,
    "stacked": lambda work: Stacked(work, record=False),
    "stacked, recorded": Stacked,
    "stacked, recorded, tf32": lambda work: Stacked(work, "tf32"),
    "stacked, recorded, bfloat16": lambda work: Stacked(work, "bfloat16"),
    "stacked, recorded each time, bfloat16": lambda work: Stacked(work, "bfloat16", keep=False),
}
ON_A_CPU = ("plain", "stacked")
#: How a run computes in each precision on a GPU; on a CPU as the plain loop.
OF_A_RUN: dict[Precision, str] = {"float32": "stacked, recorded", "tf32": "stacked, recorded, tf32"}

app = App(name="python -m fedkd.bench.gpu", result_action="return_value", help_format="plaintext", version_flags=[])


@app.default
def measure(
    *,
    model: Annotated[
        tuple[str, ...], Parameter(help="Models of the clients, one after the other.", consume_multiple=True)
    ] = ("resnet8", "cnn"),
    clients: Annotated[int, Parameter(help="Clients.", validator=Number(gte=1))] = 20,
    images: Annotated[
        int, Parameter(help="Images of each client; a multiple of 32.", validator=Number(gte=32, modulo=32))
    ] = 512,
    shared: Annotated[
        int, Parameter(help="Images of which each client predicts the logits.", validator=Number(gte=1))
    ] = 10_000,
    repeats: Annotated[int, Parameter(help="Timed runs of each implementation.", validator=Number(gte=1))] = 5,
    rounds: Annotated[
        int, Parameter(help="Rounds of the whole run, of which the first is not counted.", validator=Number(gte=2))
    ] = 12,
    run_images: Annotated[
        int, Parameter(help="Images of each client of the whole run; as of 20 of CIFAR-10.", validator=Number(gte=1))
    ] = 2250,
    device: Annotated[str, Parameter(help="cuda; on a CPU only what runs without a graph.")] = "cuda",
    profile: Annotated[bool, Parameter(help="Also list the most expensive kernels.", negative="")] = False,
) -> None:
    """Time each implementation of training many clients on a GPU, and print a JSON object for each of them.

    The last object of a model is about a whole run.
    """
    from fedkd.core.runtime import device as resolve_device

    for each in model:
        work = Work.of(each, clients, images, shared, resolve_device(device))
        on_gpu = work.device.type == "cuda"
        name = torch.cuda.get_device_name(work.device) if on_gpu else "cpu"
        print(json.dumps({"device": name, "torch": torch.__version__, "model": each}), flush=True)
        with Stack(1).computing():  # in IEEE float32
            oracle = Plain(work).train()
        speeds: dict[str, float] = {}
        for name, build in IMPLEMENTATIONS.items():
            if on_gpu or name in ON_A_CPU:
                measured = _measured(build, work, oracle, repeats, profile)
                speeds[name] = measured["images_per_second"]
                times = {"times_the_plain_loop": round(speeds[name] / speeds["plain"], 1)}
                print(json.dumps({"implementation": name} | times | measured), flush=True)
        precision = resolve("auto", str(work.device))
        alone = clients * run_images * EPOCHS / speeds[OF_A_RUN[precision] if on_gpu else "plain"]
        run = stacks.Work(clients, run_images, rounds, each, device=device)
        print(json.dumps({"run": f"{rounds} rounds", "precision": precision} | _whole_run(run, alone)), flush=True)


def _whole_run(work: stacks.Work, alone: float) -> dict[str, float]:
    """Seconds of the rounds of a run in a process of its own; ``alone`` are those of a round's training on its own."""
    run = stacks.fedkd(work, augment=True, evaluate_every=1, checkpoint_every=1, local_epochs=EPOCHS)  # as by default
    of_round, of_evaluation = (median(report.warm(each)) for each in (run.rounds, run.evaluations))
    return {
        "seconds_of_first_round": round(run.rounds[0], 3),
        "seconds_of_later_rounds": round(of_round, 4),
        "seconds_of_their_evaluation": round(of_evaluation, 4),
        "seconds_of_training_alone": round(alone, 4),
        "share_outside_training": round(1 - alone / of_round, 3),
        "share_outside_training_with_evaluation": round(1 - alone / (of_round + of_evaluation), 3),
        "seconds_outside_rounds": round(run.seconds_outside_rounds, 1),
    }


def _measured(
    build: Callable[[Work], Plain | Stacked], work: Work, oracle: Weights, repeats: int, profile: bool
) -> dict[str, Any]:
    seconds_of_first, (implementation, weights) = _timed(lambda: (made := build(work), made.train()), work.device)
    images = sum(len(job.pixels) for job in work.jobs)
    implementation.predict()
    return {
        "images_per_second": round(
            images / median(_timed(implementation.train, work.device)[0] for _ in range(repeats))
        ),
        "seconds_of_first_run": round(seconds_of_first, 2),
        "difference": max((weights[name] - oracle[name]).abs().max().item() for name in weights),
        "repeats": all(torch.equal(weights[name], again) for name, again in implementation.train().items()),
        "seconds_to_predict": round(min(_timed(implementation.predict, work.device)[0] for _ in range(2)), 3),
        **({"kernels": _kernels(implementation)} if profile and work.device.type == "cuda" else {}),
    }


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _kernels(implementation: Plain | Stacked, count: int = 25) -> dict[str, list[float]]:
    """The microseconds and the number of calls in a run, of all kernels and of those that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as recorded:
        implementation.train()
        torch.cuda.synchronize()
    found = [(each.self_device_time_total, each.count, each.key[:90]) for each in recorded.key_averages()]
    found = sorted((each for each in found if each[0] > 0), reverse=True)
    total = {"all": [round(sum(each[0] for each in found)), sum(each[1] for each in found)]}
    return total | {key: [round(microseconds), calls] for microseconds, calls, key in found[:count]}


if __name__ == "__main__":
    cli.run(app)
