"""The kernels for stacked clients, in Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedkd.bench import kernels as bench
from fedkd.core.seeds import seeded
from fedkd.training import models
from fedkd.training.kernels import convolution, normalization, pooling
from fedkd.training.stack import Stack
from tests.conftest import ROOT, slow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a GPU")
# The interpreter computes "tf32" in float32, too, and rounds to bfloat16 towards zero.
TOLERANCES = {"ieee": 1e-6, "tf32": 1e-6 if INTERPRETED else 3e-3, "bfloat16": 2**-7}

# Clients, images of each, input channels, output channels, size of the images, kernel, stride, padding.
LAYERS = {
    "3x3": (3, 2, 16, 16, (8, 8), (3, 3), (1, 1), (1, 1)),
    "three channels, odd size": (3, 2, 3, 16, (7, 9), (3, 3), (1, 1), (1, 1)),
    "stride 2": (3, 2, 5, 20, (9, 8), (3, 3), (2, 2), (1, 1)),
    "1x1": (2, 3, 7, 33, (5, 5), (1, 1), (1, 1), (0, 0)),
    "1x1, stride 2": (2, 2, 16, 32, (7, 8), (1, 1), (2, 2), (0, 0)),
    "5x5": (1, 3, 4, 6, (7, 7), (5, 5), (1, 1), (2, 2)),
    "7x7, stride 2": (2, 1, 3, 8, (13, 13), (7, 7), (2, 2), (3, 3)),
    "rectangles": (2, 2, 6, 10, (8, 11), (3, 2), (2, 3), (0, 1)),
    "padding larger than the kernel": (2, 1, 2, 3, (4, 4), (2, 2), (1, 1), (2, 3)),
    "one image, one client": (1, 1, 3, 1, (3, 3), (3, 3), (1, 1), (0, 0)),
    "several blocks of channels": (1, 1, 72, 70, (2, 3), (3, 3), (1, 1), (1, 1)),
    "several partial sums": (2, 2, 3, 4, (18, 16), (3, 3), (1, 1), (1, 1)),
}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    """The tests below in another process: Triton reads the variable when it is imported."""
    files = [str(path) for path in Path(__file__).parent.glob("test_*kernels.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def layer(name, dtype=torch.float32, bias=True):
    """Random x, weight, bias and gradient of the result, and the other arguments of a layer."""
    clients, images, channels, outputs, size, kernel, stride, padding = LAYERS[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x = random(clients * images, channels, *size).to(dtype, memory_format=torch.channels_last)
    weight, biases = random(clients, outputs, channels, *kernel), random(clients, outputs) if bias else None
    rows, columns = ((s + 2 * p - k) // t + 1 for s, k, t, p in zip(size, kernel, stride, padding, strict=True))
    gradient = random(clients * images, outputs, rows, columns).to(dtype, memory_format=torch.channels_last)
    return x, weight, biases, gradient, stride, padding


def gradients(y, inputs, gradient):
    """The result and the gradients with respect to all inputs that are there."""
    inputs = [tensor for tensor in inputs if tensor is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, gradient)]


def computed(x, weight, bias, gradient, stride, padding, precision="ieee"):
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    return gradients(convolution.conv2d(*inputs, stride, padding, precision), inputs, gradient)


def expected(x, weight, bias, gradient, stride, padding):
    """PyTorch's convolution in float64, client by client; the same results as those of ``computed``."""
    x, weight, bias, gradient = (
        tensor if tensor is None else tensor.detach().cpu().double() for tensor in (x, weight, bias, gradient)
    )
    inputs = [tensor if tensor is None else tensor.requires_grad_() for tensor in (x, weight, bias)]
    biases = [None] * len(weight) if bias is None else bias
    parts = zip(x.chunk(len(weight)), weight, biases, strict=True)
    y = torch.cat([functional.conv2d(part, w, b, stride, padding) for part, w, b in parts])
    return gradients(y, inputs, gradient)


def assert_close(results, references, tolerance):
    """Up to rounding, relative to the largest number of each result."""
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert (result.cpu().double() - reference).abs().max() <= tolerance * reference.abs().max()


@needs_kernels
@pytest.mark.parametrize(("name", "precision"), [(name, "tf32") for name in LAYERS] + [("rectangles", "ieee")])
def test_a_convolution_equals_that_of_each_client(name, precision):
    arguments = layer(name)
    results = computed(*arguments, precision)
    assert_close(results, expected(*arguments), TOLERANCES[precision])
    assert {tensor.dtype for tensor in results} == {torch.float32}
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[2].stride() == convolution.taps_first(results[2]).stride()


@needs_kernels
@pytest.mark.parametrize("name", ["three channels, odd size", "stride 2"])
def test_a_convolution_of_bfloat16_has_float32_sums_and_gradients_of_weights(name):
    x, weight, _, gradient, *rest = layer(name, torch.bfloat16, bias=False)
    weight = weight.bfloat16().float()
    results = computed(x, weight, None, gradient, *rest)
    assert [tensor.dtype for tensor in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
    references = expected(x, weight, None, gradient, *rest)
    assert_close(results[:2], references[:2], TOLERANCES["bfloat16"])
    assert_close(results[2:], references[2:], TOLERANCES["ieee"])


@needs_kernels
def test_results_depend_neither_on_strides_nor_on_other_clients_and_repeat():
    x, weight, bias, gradient, *rest = layer("several partial sums")
    rest.append("tf32")  # with the larger tiles; the benchmark below has the others, of ieee and bfloat16
    results = computed(x, weight, bias, gradient, *rest)
    again = computed(x.contiguous(), convolution.taps_first(weight), bias, gradient.contiguous(), *rest)
    assert all(map(torch.equal, results, again))
    last = computed(*(tensor.tensor_split(2)[1] for tensor in (x, weight, bias, gradient)), *rest)
    assert all(torch.equal(result.tensor_split(2)[1], part) for result, part in zip(results, last, strict=True))


@needs_kernels
@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_the_benchmark_of_kernels_finds_small_errors(precision):
    found = bench.errors(bench.Layer(5, 20, 6, 3, 2), precision, clients=2, images=2)
    assert set(found) == set(bench.PASSES)
    for errors in found.values():
        assert 0 < errors["error"] < TOLERANCES[precision]
        assert errors["repeats"]
        assert errors["equal alone"]


@needs_kernels
@pytest.mark.parametrize("name", bench.PASSES)
def test_every_tile_of_a_sweep_computes_the_same(name):
    case = bench.Case(bench.Layer(3, 17, 4, 3, 1), "tf32", 1, 1)
    reference = case.reference(torch.float64)[name].cpu()
    for tile in case.candidates(name):
        assert_close([case.run(name, tile)], [reference], TOLERANCES["tf32"])


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", slow("bfloat16")])
def test_a_stack_uses_the_kernels(precision, monkeypatch):
    """Its logits and gradients are those of PyTorch, and no weight is copied for a kernel."""
    with seeded(0):
        own, calls = [models.build("resnet8:width=8", 10, "group").to(DEVICE) for _ in range(2)], []
    for name in ("conv2d", "taps_first"):
        original = getattr(convolution, name)
        monkeypatch.setattr(
            convolution, name, lambda *rest, name=name, original=original: (calls.append(name), original(*rest))[1]
        )
    stack = Stack(2, precision)
    network = stack.add(own[0], [each.state_dict() for each in own])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits = network(x)
    logits.square().sum().backward()
    assert calls == ["taps_first"] * 9 + ["conv2d"] * 9
    for network_of_client, part in zip(own, x.chunk(2), strict=True):
        network_of_client(part).square().sum().backward()
    tolerance = 1e-4 if precision == "float32" else 0.2  # of two images
    expected = torch.cat([each(part) for each, part in zip(own, x.chunk(2), strict=True)])
    assert_close([logits], [expected.cpu().double()], tolerance)
    for name, parameter in network.named_parameters():
        reference = torch.stack([each.get_parameter(name).grad for each in own])
        assert parameter.dtype == torch.float32
        assert (parameter.grad - reference).norm() <= tolerance * reference.norm()
        assert parameter.grad.stride() == parameter.stride() or parameter.dim() < 5
        assert stack.weights(network)[1][name].is_contiguous()


class _Compiled:
    """A kernel that is compiled for an H100 where it would be run."""

    def __init__(self, kernel):
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid):
        def compile_(*arguments, num_warps=4, num_stages=3, **others):
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource

            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | others
            types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
            signature, constants = {}, {}
            for parameter in self.kernel.params:
                name, value = parameter.name, values[parameter.name]
                if parameter.is_constexpr or value is None:
                    signature[name], constants[name] = "constexpr", value
                else:
                    signature[name] = types[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            source = ASTSource(self.kernel, signature, constants)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.programs.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))

        return compile_


@pytest.mark.skipif(find_spec("triton") is None or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("precision", [*map(slow, ("ieee", "tf32")), "bfloat16"])
def test_the_kernels_are_compiled_for_a_gpu_without_one(monkeypatch, tmp_path, precision):
    from fedkd.training.kernels import triton_convolution, triton_normalization, triton_pooling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = {}
    for module, names in (
        (triton_convolution, ("convolve", "weight_gradient", "add_parts")),
        (triton_normalization, ("group_norm", "group_norm_gradient")),
        (triton_pooling, ("max_pool", "max_pool_gradient")),
    ):
        for name in names:
            compiled[name] = _Compiled(getattr(module, name))
            monkeypatch.setattr(module, name, compiled[name])
    case = bench.Case(bench.Layer(16, 32, 32, 3, 2), precision, clients=2, images=8)
    bias, ones = (torch.ones(2, channels, device=DEVICE) for channels in (32, 16))
    computed(case.x, case.weight, bias, case.gradient, case.stride, case.padding, case.precision)
    x = case.x.requires_grad_()
    normalization.group_norm(x, ones, ones, 2, 1e-5, torch.zeros_like(x), True).sum().backward()
    pooling.max_pool2d(x, 2).sum().backward()
    assert {name: len(kernel.programs) for name, kernel in compiled.items()} == {
        "convolve": 5,  # the gradient of two rows and two columns is computed each on its own
        "weight_gradient": 2,
        "add_parts": 3,
        "group_norm": 1,
        "group_norm_gradient": 1,
        "max_pool": 1,
        "max_pool_gradient": 1,
    }
    # An image is read once: x, weight, bias, shortcut; gradient, x, y, weight, mean, scale; the window, the gradient.
    loads = {name: kernel.programs[0].asm["ttgir"].count("tt.load") for name, kernel in compiled.items()}
    assert loads["group_norm"] == 4
    assert loads["group_norm_gradient"] == 6
    assert loads["max_pool_gradient"] == 5


def test_what_the_kernels_do_not_cover(monkeypatch):
    x = torch.zeros(1, 3, 4, 4, device=DEVICE)
    monkeypatch.setattr("fedkd.training.kernels._has_triton", lambda: True)
    assert convolution.covers(x, 1, (1, 1)) == (INTERPRETED or DEVICE == "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert convolution.covers(x.bfloat16(), 1, (1, 1))
    assert not convolution.covers(x, 3, (1, 1))
    assert not convolution.covers(x, 1, (1, 2))
    assert not convolution.covers(x.double(), 1, (1, 1))
    monkeypatch.setattr("fedkd.training.kernels._has_triton", lambda: False)
    assert not convolution.covers(x, 1, (1, 1))


def test_triton_is_imported_at_the_first_use():
    code = "import sys, torch; from fedkd.training.kernels import convolution, normalization, pooling"
    code += "; convolution.covers(torch.zeros(1), 1, (1, 1)); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
