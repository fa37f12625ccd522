"""The convolution kernels on a GPU: their errors, and their times for candidates of tiles.

    python -m fedkd.bench.kernels --sweep

Prints one JSON object a line. The tiles of `fedkd.training.kernels.tiles` are chosen from the sweep by hand; they are
never chosen while a model is trained, since results would then differ from run to run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.core.errors import UsageError
from fedkd.training.kernels import convolution, normalization, tiles
from fedkd.training.kernels.tiles import Tile


class Layer(NamedTuple):
    """A square convolution with padding for a result of the size of the input, divided by the stride."""

    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int


#: How many such layers the models have.
LAYERS: dict[Layer, dict[str, int]] = {
    Layer(3, 16, 32, 3, 1): {"resnet8": 1, "resnet20": 1},
    Layer(16, 16, 32, 3, 1): {"resnet8": 2, "resnet20": 6},
    Layer(16, 32, 32, 3, 2): {"resnet8": 1, "resnet20": 1},
    Layer(16, 32, 32, 1, 2): {"resnet8": 1, "resnet20": 1},
    Layer(32, 32, 16, 3, 1): {"resnet8": 1, "resnet20": 5},
    Layer(32, 64, 16, 3, 2): {"resnet8": 1, "resnet20": 1},
    Layer(32, 64, 16, 1, 2): {"resnet8": 1, "resnet20": 1},
    Layer(64, 64, 8, 3, 1): {"resnet8": 1, "resnet20": 5, "cnn": 1},
    Layer(3, 32, 32, 3, 1): {"cnn": 1},
    Layer(32, 64, 16, 3, 1): {"cnn": 1},
}
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "input gradient", "weight gradient")


class Case:
    """Random tensors of a layer for K clients with B images each, and its three passes."""

    def __init__(self, layer: Layer, precision: str, clients: int, images: int) -> None:
        self.layer, self.precision = layer, "ieee" if precision == "bfloat16" else precision
        self.stride, self.padding = (layer.stride,) * 2, (layer.kernel // 2,) * 2
        device = "cuda" if torch.cuda.is_available() else "cpu"  # in the interpreter
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        size, dtype, memory = layer.size, PRECISIONS[precision], torch.channels_last
        self.x = random(clients * images, layer.channels, size, size).to(dtype, memory_format=memory)
        weight = random(clients, layer.outputs, layer.channels, layer.kernel, layer.kernel)
        self.weight = convolution.taps_first(weight.to(dtype).float())
        result = (size + 2 * self.padding[0] - layer.kernel) // layer.stride + 1
        self.gradient = random(clients * images, layer.outputs, result, result).to(dtype, memory_format=memory)

    def tile(self, name: str) -> Tile:
        """The tile that the operator uses."""
        channels, outputs, _, kernel, _ = self.layer
        options = (kernel, kernel), self.x.dtype, self.precision
        if name == "weight gradient":
            return tiles.weight_gradient_tile(channels, outputs, *options)
        if name == "input gradient":
            channels, outputs = outputs, channels
        return tiles.convolution_tile(channels, outputs, *options, name == "input gradient")

    def run(self, name: str, tile: Tile) -> Tensor:
        """The result of a pass."""
        options = self.stride, self.padding, self.precision, tile
        if name == "forward":
            return convolution.run_convolution(self.x, self.weight, None, *options)
        if name == "input gradient":
            size = self.x.shape[2:]
            return convolution.run_input_gradient(self.gradient, self.weight, size, *options)
        return convolution.run_weight_gradient(self.x, self.gradient, len(self.weight), self.weight.shape[3:], *options)

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of PyTorch, client by client."""
        parts = (self.x, self.gradient)
        results: list[tuple[Tensor, ...]] = []
        for x, gradient, weight in zip(*(part.chunk(len(self.weight)) for part in parts), self.weight, strict=True):
            x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            y = functional.conv2d(x, weight, None, self.stride, self.padding)
            results.append((y.detach(), *torch.autograd.grad(y, (x, weight), gradient.to(dtype))))
        forward, of_x, of_weight = zip(*results, strict=True)
        return dict(zip(PASSES, (torch.cat(forward), torch.cat(of_x), torch.stack(of_weight)), strict=True))

    def candidates(self, name: str) -> Iterator[Tile]:
        """The tiles of a sweep; none of the blocks is larger than needed."""
        channels, outputs, _, kernel, _ = self.layer
        if name == "input gradient":
            channels, outputs = outputs, channels
        elements = max(16, 1 << (channels * kernel**2 - 1).bit_length())
        block = min(64, max(16, 1 << (outputs - 1).bit_length()))
        if name == "weight gradient":
            shapes = [(32, 32, 2), (32, 64, 2), (64, 64, 2), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4)]
            shapes += [(64, 128, 8), (32, 256, 8), (128, 64, 8)]
            for (positions, most, warps), stages, span in product(shapes, (1, 2), (256, 512, 1024, 2048)):
                if most <= elements or most == 64:
                    yield Tile(positions, min(most, elements), block, warps, stages, span)
        else:
            shapes = [(64, 32, 4), (128, 16, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (256, 32, 8), (256, 16, 8)]
            for (positions, most, warps), stages in product(shapes, (1, 2, 3)):
                if most <= elements:
                    yield Tile(positions, most, block, warps, stages)


def microseconds(run: Callable[[], object], calls: int = 10, repeats: int = 5) -> float:
    """The shortest mean time of a call in a captured series."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times: list[float] = []
    for _ in range(repeats + 1):  # the first one is a warm-up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return round(min(times[1:]), 1)


def errors(layer: Layer, precision: str, clients: int, images: int) -> dict[str, object]:
    """Of each pass the largest difference to PyTorch in float64, over the largest number; also cuDNN's."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    case, last = Case(layer, precision, clients, images), Case(layer, precision, clients, images)
    last.x, last.gradient, last.weight = case.x[-images:], case.gradient[-images:], case.weight[-1:]
    exact, of_cudnn = case.reference(torch.float64), case.reference(PRECISIONS[precision])
    found: dict[str, object] = {}
    for name in PASSES:
        tile, largest = case.tile(name), exact[name].abs().max()
        result, alone = case.run(name, tile), last.run(name, tile)
        found[name] = {
            "error": ((result - exact[name]).abs().max() / largest).item(),
            "error of cuDNN": ((of_cudnn[name] - exact[name]).abs().max() / largest).item(),
            "repeats": all(torch.equal(result, case.run(name, tile)) for _ in range(3)),
            "equal alone": torch.equal(result[-len(alone) :], alone),
        }
    return found


def norms(channels: int, size: int, precision: str, clients: int, images: int) -> dict[str, Any]:
    """The error and the times of group normalization with shortcut and ReLU, in microseconds.

    Beside them, the bytes that it reads and writes at least: forward x, shortcut and y, backward twice as much.
    """
    case = Case(Layer(channels, channels, size, 1, 1), precision, clients, images)
    x, shortcut = case.x, case.gradient
    weight, bias = case.weight.flatten(1)[:, :channels].contiguous(), case.weight.flatten(1)[:, -channels:].contiguous()
    inputs = (x, weight, bias, shortcut, channels // 8, 1e-5, True)
    results = normalization.run_group_norm(*inputs)
    parts = zip(x.double().chunk(clients), weight.double(), bias.double(), strict=True)
    exact = torch.cat([functional.group_norm(part, channels // 8, w, b) for part, w, b in parts])
    exact = (exact + shortcut.double()).relu()
    backward = partial(normalization.run_gradient, shortcut, x, results[0], weight, *results[1:], True)
    return {
        "error": ((results[0] - exact).abs().max() / exact.abs().max()).item(),
        "forward": microseconds(partial(normalization.run_group_norm, *inputs)),
        "backward": microseconds(backward),
        "megabytes forward": 3 * x.nbytes / 1e6,
    }


def compile_candidates(layer: Layer, name: str, precision: str) -> None:
    """Fill Triton's cache on disk; what is compiled depends on neither the number of clients nor that of images."""
    case = Case(layer, precision, 1, 1)
    for tile in case.candidates(name):
        try:
            case.run(name, tile)
        except Exception as error:  # out of shared memory or registers
            print(json.dumps({"layer": layer, "pass": name, "tile": tile, "refused": str(error)[:80]}), flush=True)


def times(layer: Layer, name: str, precision: str, clients: int, images: int, sweep: bool) -> dict[str, Any]:
    """The time of a pass in microseconds with the operator's tile and, in a sweep, with others, fastest first."""
    case = Case(layer, precision, clients, images)
    measured = []
    for tile in case.candidates(name) if sweep else ():
        try:
            measured.append((microseconds(partial(case.run, name, tile)), tile))
        except Exception:  # listed by compile_candidates
            continue
    now = case.tile(name)
    return {"now": (microseconds(partial(case.run, name, now)), now), "sweep": sorted(measured)}


def measure(*, clients: int = 20, images: int = 32, sweep: bool = False) -> None:
    """Print errors and times of all layers for K clients with B images each, one JSON object a line.

    Raises:
        UsageError: there is no GPU.

    """
    if not torch.cuda.is_available():
        raise UsageError("Kernels are measured on a GPU, and PyTorch finds none here; install its CUDA build on one.")

    def show(**values: object) -> None:
        print(json.dumps(values), flush=True)

    show(device=torch.cuda.get_device_name(), torch=torch.__version__, clients=clients, images=images)
    for precision, layer in product(PRECISIONS, LAYERS):
        show(layer=layer, precision=precision, errors=errors(layer, precision, clients, images))
    for (channels, size), precision in product(((16, 32), (32, 16), (64, 8)), ("ieee", "bfloat16")):
        found = norms(channels, size, precision, clients, images)
        show(group_norm=[channels, size, size], precision=precision, **found)
    cases = [
        (layer, name, precision)
        for precision, name, layer in product(("tf32", "bfloat16"), reversed(PASSES), LAYERS)
        if layer.channels > 3 or name != "input gradient"  # of an image no gradient is needed
    ]
    if sweep:
        start, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            list(pool.map(compile_candidates, *zip(*cases, strict=True)))
        show(seconds_to_compile=time.perf_counter() - start)
    totals: Counter[tuple[str, ...]] = Counter()
    for layer, name, precision in cases:
        found = times(layer, name, precision, clients, images, sweep)
        show(layer=layer, precision=precision, **{"pass": name}, **found)
        for model, count in LAYERS[layer].items():
            totals[model, precision, name, "now"] += count * found["now"][0]
            totals[model, precision, name, "fastest"] += count * min([found["now"], *found["sweep"]])[0]
    show(microseconds_of_a_step={", ".join(key): round(total) for key, total in totals.items()})


if __name__ == "__main__":
    from cyclopts import App

    from fedkd.core import cli

    app = App(name="python -m fedkd.bench.kernels", result_action="return_value", version_flags=[])
    app.default(measure)
    cli.run(app)
