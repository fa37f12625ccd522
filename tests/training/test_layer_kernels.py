"""The kernels of normalization and pooling, in Triton's interpreter on a CPU, and on a GPU if there is one."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.core.seeds import seeded
from fedkd.training import loop, models, optimizers
from fedkd.training.batches import Job
from fedkd.training.kernels import convolution, normalization, pooling
from fedkd.training.stack import Stack
from fedkd.training.stacked_loop import Learner, train
from tests.conftest import ROOT, slow
from tests.training.test_kernels import DEVICE, TOLERANCES, assert_close, gradients, needs_kernels

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# Clients, images of each, channels, groups, size of the images.
NORMS = {
    "groups of eight": (2, 2, 16, 2, (5, 3)),
    "three groups": (3, 1, 24, 3, (4, 4)),
    "more than one block": (2, 2, 130, 13, (3, 1)),
    "one group": (1, 2, 7, 1, (9, 9)),
    "one large group": (1, 1, 96, 1, (8, 8)),
}


def normalized(name, dtype=torch.float32, shortcut=True, relu=True, only=slice(None)):
    """The result and gradients of the kernel, and of PyTorch in float64, client by client."""
    clients, images, channels, groups, size = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(clients, images, channels, *size)] * 3 + [(clients, channels)] * 2
    x, gradient, addend, weight, bias = (torch.randn(shape, generator=generator).to(DEVICE)[only] for shape in shapes)
    x, gradient, addend = (t.flatten(0, 1).to(dtype, memory_format=torch.channels_last) for t in (x, gradient, addend))
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, addend)[: 4 if shortcut else 3]]
    y = normalization.group_norm(*inputs[:3], groups, 1e-5, inputs[3] if shortcut else None, relu)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    parts = zip(exact[0].chunk(len(weight)), exact[1], exact[2], strict=True)
    reference = torch.cat([functional.group_norm(part, groups, w, b) for part, w, b in parts])
    reference = reference + exact[3] if shortcut else reference
    reference = reference.relu() if relu else reference
    return gradients(y, inputs, gradient), gradients(reference, exact, gradient.cpu().double())


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_group_normalization_equals_that_of_each_client(name, shortcut, relu):
    results, references = normalized(name, shortcut=shortcut, relu=relu)
    assert_close(results, references, TOLERANCES["ieee"])
    assert results[0].is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_group_normalization_of_bfloat16_has_float32_gradients_of_parameters():
    results, references = normalized("groups of eight", torch.bfloat16)
    assert_close(results, references, TOLERANCES["bfloat16"])
    assert [tensor.dtype for tensor in results] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16]


@needs_kernels
def test_group_normalization_repeats_and_is_independent_of_other_clients():
    results, _ = normalized("three groups")
    again, _ = normalized("three groups")
    assert all(map(torch.equal, results, again))
    last, _ = normalized("three groups", only=slice(2, None))
    assert all(torch.equal(result[-len(part) :], part) for result, part in zip(results, last, strict=True))


# What follows a normalization y and another one u of x; whether a shortcut and ReLU are computed with them.
FOLLOWING = {
    "nothing": (lambda y, u, x: y, [(False, False)]),
    "ReLU": (lambda y, u, x: y.relu(), [(False, True)]),
    "a layer": (lambda y, u, x: nn.ReLU(inplace=True)(y), [(False, True)]),
    "ReLU in place, and again": (lambda y, u, x: nn.ReLU(inplace=True)(y) + y, [(False, True)]),
    "a shortcut": (lambda y, u, x: x + y, [(True, False)]),
    "both": (lambda y, u, x: torch.relu(torch.add(y, x)), [(True, True)]),
    "two of them": (lambda y, u, x: (u + y).relu(), [(False, False), (True, True)]),
    "twice": (lambda y, u, x: y.relu() + y, [(False, True), (True, False)]),
    "after it was used": (lambda y, u, x: (y * 1, y.relu())[1], [(False, False)]),
    "two shortcuts": (lambda y, u, x: (y + x + x.sin()).relu(), [(True, False)]),
    "a factor": (lambda y, u, x: torch.add(y, x, alpha=2).relu(), [(False, False)]),
    "a number": (lambda y, u, x: (y + 1).relu(), [(False, False)]),
    "a smaller one": (lambda y, u, x: (y + x[:, :, :1]).relu(), [(False, False)]),
    "another type": (lambda y, u, x: (y + x.double()).relu().float(), [(False, False)]),
    "in place": (lambda y, u, x: y.add_(x).relu_(), [(False, False)]),
    "into another": (lambda y, u, x: (x * 1).add_(y), [(False, False)]),
    "without a gradient": (lambda y, u, x: (_without_gradient(y, x), y + x)[1], [(False, False)]),
    "detached": (lambda y, u, x: y.detach() + x, [(False, False)]),
    "a shape": (lambda y, u, x: y.reshape(*y.shape[:2], -1).mean(-1, keepdim=True)[..., None], [(False, False)]),
    "pooling": (lambda y, u, x: functional.interpolate(nn.MaxPool2d(2)(y), scale_factor=2.0), [(False, False)]),
}


@torch.no_grad()
def _without_gradient(y, x):
    assert not (y + x).relu().requires_grad


class Follows(nn.Module):
    """Two normalizations of the same convolution, and what follows them."""

    def __init__(self, following):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)
        self.following = following

    def forward(self, x):
        x = self.conv(x)
        return self.following(self.second(x), self.first(x), x)


@needs_kernels
@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_a_normalization_is_computed_with_it_where_it_can_be(name, monkeypatch):
    """The results and gradients are those of each client, in training and in prediction."""
    following, expected = FOLLOWING[name]
    calls, compute = [], normalization.group_norm

    def noted(*inputs, shortcut=None, relu=False):
        calls.append((shortcut is not None, relu))
        return compute(*inputs, shortcut, relu)

    with seeded(0):
        own = [Follows(following).to(DEVICE) for _ in range(2)]
        x, direction = torch.randn(4, 3, 4, 4).to(DEVICE), torch.randn(4, 8, 4, 4).to(DEVICE)
        for module in own:
            for norm in (module.first, module.second):
                norm.weight.data.normal_()
                norm.bias.data.normal_()
    monkeypatch.setattr(normalization, "group_norm", noted)
    stack = Stack(2)
    network = stack.add(own[0], [each.state_dict() for each in own])
    y = stack.output_of(network, x)
    (y * direction).sum().backward()
    assert calls == expected
    with torch.inference_mode():
        assert_close([stack.output_of(network, x)], [y.detach().cpu().double()], 1e-5)
    wanted = [each.cpu().double()(part) for each, part in zip(own, x.cpu().double().chunk(2), strict=True)]
    (torch.cat(wanted) * direction.cpu()).sum().backward()
    assert_close([y.detach()], [torch.cat(wanted).detach()], 1e-5)
    for name, parameter in network.named_parameters():
        found, exact = parameter.grad, [each.get_parameter(name).grad for each in own]
        assert (found is None) == (exact[0] is None)
        if found is not None:
            assert_close([found], [torch.stack(exact)], 1e-5)


@needs_kernels
@pytest.mark.parametrize("changed", ["input", "weight", "shortcut"])
def test_a_normalization_is_not_computed_of_what_was_changed_in_place(changed):
    tensors = {name: torch.ones(2, 8, 3, 3, device=DEVICE) for name in ("input", "shortcut")}
    tensors |= {name: torch.ones(1, 8, device=DEVICE) for name in ("weight", "bias")}
    inputs = tensors["input"], tensors["weight"], tensors["bias"], 1
    y = normalization.Normalized(partial(normalization.group_norm, *inputs)) + tensors["shortcut"]
    tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.relu()


@needs_kernels
def test_the_gradient_of_relu_is_that_of_pytorch_where_values_are_no_numbers():
    x, ones = torch.randn(1, 8, 2, 2, device=DEVICE), torch.ones(1, 8, device=DEVICE)
    shortcut = torch.tensor([float("nan"), -9.0, 9.0, float("inf")] * 8, device=DEVICE).view(1, 8, 2, 2)
    shortcut.requires_grad_()
    normalization.group_norm(x, ones, ones, 1, 1e-5, shortcut, True).sum().backward()
    assert shortcut.grad.flatten().tolist() == [1.0, 0.0, 1.0, 1.0] * 8


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Hidden(Double):
    """It switches gradients on, as functions do that compute their input again."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            return (x.detach() * 2).detach()


@needs_kernels
@pytest.mark.parametrize("function", [Double, Hidden])
def test_a_gradient_that_would_be_lost_is_an_error(function):
    u, ones = torch.randn(2, 8, 3, 3, device=DEVICE), torch.ones(1, 8, device=DEVICE, requires_grad=True)
    y = normalization.Normalized(partial(normalization.group_norm, u, ones, ones, 1))
    with pytest.raises(RuntimeError, match=r"ends in a torch\.autograd\.Function"):
        (function.apply(y) + y).sum().backward()


# Images, channels, size of the images, size of the windows.
POOLS = {
    "even": (3, 16, (8, 6), 2),
    "odd": (2, 5, (7, 9), 2),
    "three": (2, 3, (11, 10), 3),
    "more than one block": (1, 130, (8, 8), 2),
    "one": (2, 8, (3, 3), 1),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_equals_that_of_pytorch_to_the_bit(name, dtype):
    """Also where values are equal, of both zeros, and NaN."""
    images, channels, size, window = POOLS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (images, channels, *size), generator=generator).to(dtype)
    x[0, 0], x[0, 1] = float("nan"), torch.tensor([0.0, -0.0]).repeat(x[0, 1].numel())[: x[0, 1].numel()].view(size)
    mine, theirs = x.to(DEVICE, memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()
    y, expected = pooling.max_pool2d(mine, window), functional.max_pool2d(theirs, window)
    gradient = torch.randn(expected.shape, generator=generator).to(dtype)
    y.backward(gradient.to(DEVICE))
    expected.backward(gradient)
    for found, exact in ((y.detach(), expected.detach()), (mine.grad, theirs.grad)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.cpu().isnan(), exact.isnan())
        assert torch.equal(found.cpu().nan_to_num(), exact.nan_to_num())
        assert torch.equal(found.cpu().nan_to_num().signbit(), exact.nan_to_num().signbit())


@needs_kernels
@pytest.mark.parametrize(
    "compute",
    [
        lambda x: convolution.conv2d(x, torch.ones(1, 2, 8, 1, 1, device=DEVICE), None, (1, 1), (0, 0), "ieee"),
        lambda x: normalization.group_norm(x, *torch.ones(2, 1, 8, device=DEVICE), 1),
        lambda x: pooling.max_pool2d(x, 2),
    ],
)
def test_there_are_no_second_derivatives(compute):
    x = torch.randn(2, 8, 4, 4, device=DEVICE).requires_grad_()
    (first,) = torch.autograd.grad(compute(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_windows_that_the_kernel_covers():
    assert pooling.window(nn.MaxPool2d(2)) == pooling.window(nn.MaxPool2d((2, 2), 2)) == 2
    others = [(5,), ((2, 3),), (3, 2), (2, 2, 1), (2, 2, 0, 2), (2, 2, 0, 1, True), (2, 2, 0, 1, False, True)]
    assert [pooling.window(nn.MaxPool2d(*options)) for options in others] == [0] * len(others)


def trained(model):
    """A network, the jobs of two clients with different numbers of images, and their weights after an epoch."""
    with seeded(0):
        module = models.build(model, 4, "group").to(DEVICE, memory_format=torch.channels_last)
        images, targets = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8), torch.randint(4, (5,))
    own = [(images[:3].to(DEVICE), targets[:3].to(DEVICE)), (images[3:].to(DEVICE), targets[3:].to(DEVICE))]
    augmentation, loss = loop.Augmentation(crop=True, flip=True), functional.cross_entropy
    stack = Stack(2)
    network = stack.add(module, [module.state_dict()] * 2)
    state = optimizers.state_of(optimizers.sgd, list(network.parameters()))
    learner = Learner(network, stack, optimizers.sgd(list(network.parameters()), 0.9, 0.0005, list(state)), state)
    jobs = [Job(pixels, labels, loss, augmentation, seed) for seed, (pixels, labels) in enumerate(own)]
    train(learner, jobs, scaling, rates=[0.1], epochs=1, batch_size=2)
    return module, jobs, stack.weights(network)


def scaling(pixels):
    return pixels.permute(0, 3, 1, 2) / 255


@needs_kernels
@pytest.mark.parametrize("model", ["cnn:width=8", slow("resnet8:width=8")])
def test_training_with_the_kernels_is_that_of_each_client(model):
    module, jobs, found = trained(model)
    for client, job in enumerate(jobs):
        alone = copy.deepcopy(module)
        with Stack(1).computing():  # IEEE float32 on a GPU, too
            loop.train(
                alone,
                optimizers.sgd(list(alone.parameters()), 0.9, 0.0005),
                *(job.pixels, job.targets, job.objective, scaling),
                rates=[0.1],
                epochs=1,
                batch_size=2,
                augmentation=job.augmentation,
                seed=client,
            )
        for name, value in alone.state_dict().items():
            assert (found[client][name] - value.cpu()).abs().max() < (1e-5 if DEVICE == "cpu" else 1e-3)


@needs_kernels
def test_a_step_does_not_import_the_compiler():
    """Which takes more than a second, in every process."""
    code = "import sys; from tests.training.test_layer_kernels import trained; trained('cnn:width=8')"
    code += "; print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "['triton']\n"
