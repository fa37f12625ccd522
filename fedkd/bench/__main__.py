"""``python -m fedkd.bench``: what a run costs on this machine, in one table."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from cyclopts.validators import Number

from fedkd.bench import report, stacks
from fedkd.bench.stacks import Timing, Work
from fedkd.core import cli, environment, notes, run_directory
from fedkd.core.errors import UsageError
from fedkd.core.runtime import cores, device

Part = Literal["peak", "fedavg", "ensemble", "checkpoints", "idle", "many", "gpu"]
PARTS: tuple[Part, ...] = get_args(Part)
# Fields of `stacks.Timing` in bench.json: of each timed run, and of the run that measures memory.
TIMES = ("rounds", "seconds_outside_rounds", "seconds_to_first_client")
MEMORY_AND_BYTES = ("megabytes", "megabytes_without_images", "bytes", "messages")


@dataclass(frozen=True)
class Stack:
    """A function that runs a stack, and the name of the reference stack."""

    run: Callable[..., Timing]
    reference: str = ""


app = cli.new("bench")


@app.default
def bench(
    *,
    clients: Annotated[int, Parameter(help="Clients, all of which take part.", validator=Number(gte=1))] = 20,
    images: Annotated[int, Parameter(help="Images of each client.", validator=Number(gte=1))] = 512,
    rounds: Annotated[
        int, Parameter(help="Rounds of each run; the first is not counted.", validator=Number(gte=2))
    ] = 5,
    repeats: Annotated[
        int,
        Parameter(help="Timed runs of each stack; one more run measures memory.", validator=Number(gte=1)),
    ] = 3,
    parts: Annotated[
        tuple[Part, ...],
        Parameter(help="The parts to measure.", consume_multiple=True, negative=(), show_default="all"),
    ] = PARTS,
    out: Annotated[Path, Parameter(help="Directory of bench.json and bench.png.")] = Path("bench"),
) -> None:
    """Measure the speed and memory of fedkd, of a bare PyTorch loop and of other simulators on this machine.

    Each of these is called a stack. Stacks run alternately, so that a machine that slows down affects all of them.
    Libraries that are not installed are left out: pip install 'fedkd[bench]' installs Ray, psutil and pfl-research.

    Parts: peak (arithmetic of the machine), fedavg, ensemble, checkpoints (their cost), idle (rounds in which clients
    compute nothing), many (few participants out of more and more clients), and gpu (fedavg on a GPU, if there is one).
    """
    console = cli.Console(width=160)
    work, count = Work(clients, images, rounds), cores()
    where = device("auto") if "gpu" in parts else "cpu"
    if "gpu" in parts and where == "cpu":
        parts = tuple(part for part in parts if part != "gpu")
        if not parts:
            raise UsageError("--parts gpu: PyTorch finds no GPU here, so there is nothing to measure.")
        notes.say("the part gpu is left out, since PyTorch finds no GPU here")
    run_directory.create(out)
    about = environment.environment(where, "", "noise", "").items()
    machine = {key: value for key, value in about if key not in ("command", "precision")}
    results: dict[str, Any] = {"machine": machine, "cores": count, "options": sys.argv[1:]}
    results |= {"work": dataclasses.asdict(work), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if "peak" in parts:
        results["peak"] = {str(threads): stacks.peak(threads) for threads in dict.fromkeys((1, count))}
        results["import_torch"] = median(stacks.importing("torch") for _ in range(repeats))
    for part, measured in plan(work, count, precisions(where)).items():
        if part in parts:
            results[part] = _measure(measured, repeats, console)
            console.print(report.table(part, results))
            run_directory.write_json(out / "bench.json", results)
    if "fedavg" in results:
        report.draw(results, out / "bench.png")
    console.print(f"{out / 'bench.json'}")


def plan(work: Work, cores: int, precisions: Sequence[str]) -> dict[str, dict[str, Stack]]:
    """The stacks of each part, by name; those whose library is not installed are left out."""
    idle = Work(work.clients, 2, 100, "cnn:width=8", "fedkd.bench.idle:Idle")
    some = dataclasses.replace(idle, clients=10, images=1, registered=1_000_000)
    many = [Work(20, 2, 30, registered=registered) for registered in (20, 1_000, 100_000)]
    ensemble = dataclasses.replace(work, algorithm="ensemble", proxy=1000)
    return {
        "fedavg": _own(work, cores) | _others(work, cores),
        "ensemble": _own(ensemble, cores),
        "checkpoints": {
            "none": Stack(partial(stacks.whole, ensemble)),
            "one in each round": Stack(partial(stacks.whole, ensemble, checkpoint_every=1), "none"),
        },
        "idle": {
            f"{idle.clients} of {idle.clients} clients": Stack(partial(stacks.fedkd, idle)),
            "10 of 1,000,000 clients": Stack(partial(stacks.fedkd, some, dataset="noise:size=1000512,pixels=8")),
        },
        "gpu": on_gpu(dataclasses.replace(work, device="cuda"), cores, precisions),
        "many": {
            f"20 of {few.registered:,} clients": Stack(partial(stacks.fedkd, few), "20 of 20 clients") for few in many
        },
    }


def precisions(device: str) -> tuple[str, ...]:
    """The precisions of fedkd on a device, first the one by default, as that of the other simulators."""
    from fedkd.training.precision import resolve

    return ("tf32", "float32", "bfloat16") if resolve("auto", device) == "tf32" else ("float32",)


def _own(work: Work, cores: int) -> dict[str, Stack]:
    named = {}
    for workers in dict.fromkeys((1, cores)):
        floor = f"bare loop, {workers} process{'es' * (workers > 1)}"
        named[floor] = Stack(partial(stacks.bare, work, workers))
        named[_fedkd(workers)] = Stack(partial(stacks.fedkd, work, workers=str(workers)), floor)
    return named


def _others(work: Work, cores: int) -> dict[str, Stack]:
    named, reference = {}, _fedkd(cores)
    if stacks.is_installed("ray"):
        named["fedkd on Ray"] = Stack(partial(stacks.fedkd, work, engine="ray"), reference)
        named["Flower's simulation, default"] = Stack(partial(stacks.flower, work, 2), reference)
        named["Flower's simulation, 1 CPU per client"] = Stack(partial(stacks.flower, work, 1), reference)
    if stacks.is_installed("pfl"):
        named[f"pfl-research, {cores} processes"] = Stack(partial(stacks.pfl, work, cores), reference)
    return named


def on_gpu(work: Work, cores: int, precisions: Sequence[str]) -> dict[str, Stack]:
    """The stacks of the part ``gpu``. Flower's clients share the GPU: four of them, or one on each core."""
    named = {f"fedkd, {each}": Stack(partial(stacks.fedkd, work, precision=each)) for each in precisions}
    reference = f"fedkd, {precisions[0]}"
    if stacks.is_installed("ray"):
        for share in dict.fromkeys((min(4, cores), cores)):
            name = f"Flower's simulation, 1/{share} of the GPU per client"
            named[name] = Stack(partial(stacks.flower, work, 1, gpus=1 / share), reference)
    if stacks.is_installed("pfl"):
        named["pfl-research"] = Stack(partial(stacks.pfl, work, 1), reference)
    return named


def _fedkd(workers: int) -> str:
    return f"fedkd, {workers} worker{'s' * (workers > 1)}"


def _measure(measured: dict[str, Stack], repeats: int, console: cli.Console) -> dict[str, Any]:
    """All timings of each stack. The last run of each measures memory and not time; its data is in the cache."""
    has_psutil = stacks.is_installed("psutil")
    results: dict[str, Any] = {name: {"reference": stack.reference, "runs": []} for name, stack in measured.items()}
    for repeat in range(repeats + 1):
        for name, stack in measured.items():
            is_last = repeat == repeats
            timing = stack.run(with_memory=has_psutil and is_last)
            console.print(
                f"{name}: {median(report.warm(timing.rounds)):.4f} s per round, "
                f"{timing.seconds_outside_rounds:.1f} s outside rounds",
                style="dim",
            )
            if is_last:
                results[name] |= {key: getattr(timing, key) for key in MEMORY_AND_BYTES}
            else:
                results[name]["runs"].append({key: getattr(timing, key) for key in TIMES})
    return results


if __name__ == "__main__":
    cli.run(app)
