"""Clients in a stack get the weights that each of them gets on its own, up to rounding."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd import models
from fedkd.core import seeds
from fedkd.training import graphs, loop, optimizers, stacked_loop, trainer
from fedkd.training.batches import Job
from fedkd.training.layers import WatchedModel
from fedkd.training.loop import Augmentation, Embedded, Scaling
from fedkd.training.losses.logits import cross_entropy
from fedkd.training.stack import NotStackable, Stack, check
from fedkd.training.stacked_loop import Learner
from fedkd.training.terms import Features, Relations
from fedkd.training.terms.objective import DistillationObjective, Taught

SIZES = (31, 1, 200, 33, 32)
SCALING = Scaling((120.0,) * 3, (60.0,) * 3)
# In float32 a rounding may decide whether a ReLU passes a value on. That moves weights in proportion to the learning
# rate, so it is small here. Deep networks are compared in float64 only.
SINGLE: tuple[dict, float] = {"dtype": torch.float32, "rate": 1e-3}, 1e-5
DOUBLE: tuple[dict, float] = {"dtype": torch.float64, "rate": 0.02}, 1e-10


def module(spec: str, seed: int, dtype: torch.dtype) -> nn.Module:
    with seeds.seeded(seed):
        return models.build(spec, 10, "group").to(dtype)


def jobs(sizes=SIZES, pixels: int = 16, **changes) -> list[Job]:
    """A job for each number of images."""
    made = []
    for k, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(k)
        images = torch.randint(256, (size, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (size,), generator=generator)
        options = {"objective": F.cross_entropy, "augmentation": Augmentation(True, True), "seed": 100 + k}
        made.append(Job(images, labels, **options | {name: make(k) for name, make in changes.items()}))
    return made


def sgd(parameters: list[torch.Tensor], rate: float) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.sgd, parameters)
    return optimizers.sgd(parameters, rate, 0.9, 1e-3, list(state)), state


def adam(parameters: list[torch.Tensor], rate: float) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.adam, parameters)
    return optimizers.adam(parameters, rate / 10, state), state


def plain(network: nn.Module, job: Job, *, optimizer=sgd, dtype=torch.float32, rate=0.02, **options) -> None:
    """Train by the plain loop."""
    loop.train(
        network,
        optimizer(list(network.parameters()), rate)[0],
        job.pixels,
        job.targets,
        job.objective,
        lambda pixels: SCALING(pixels).to(dtype),
        augmentation=job.augmentation,
        seed=job.seed,
        penalty=job.penalty,
        **{"epochs": 2, "batch_size": 32} | options,
    )


def learner_of(networks: list[nn.Module], *, build=None, optimizer=sgd, rate=0.02) -> Learner:
    """What trains a stack of these networks; ``build`` makes a stack and its network of them."""
    stack, network = (build or stack_of)(networks)
    return Learner(network, stack, *optimizer(list(network.parameters()), rate))


def stacked(networks: list[nn.Module], work: list[Job], *, build=None, optimizer=sgd, rate=0.02, **options) -> Learner:
    """Train a stack of these networks, which stay as they are."""

    def learner(count: int) -> Learner:
        return learner_of(networks[:count], build=build, optimizer=optimizer, rate=rate)

    dtype = options.pop("dtype", torch.float32)
    options = {"epochs": 2, "batch_size": 32, "smaller": learner} | options
    trained = learner(len(networks))
    stacked_loop.train(trained, work, lambda pixels: SCALING(pixels).to(dtype), **options)
    return trained


def own_networks(spec: str, dtype: torch.dtype = torch.float32, count: int = len(SIZES)) -> list[nn.Module]:
    return [module(spec, seed, dtype) for seed in range(count)]


def stack_of(networks: list[nn.Module]) -> tuple[Stack, nn.Module]:
    stack = Stack(len(networks))
    return stack, stack.add(networks[0], [each.state_dict() for each in networks])


def difference(network: nn.Module, own: list[nn.Module]) -> float:
    """The largest difference of a weight."""
    return max(
        (network.state_dict()[name][k].cpu() - tensor.cpu()).abs().max().item()
        for k, each in enumerate(own)
        for name, tensor in each.state_dict().items()
    )


def after_training(spec: str, work: list[Job], *, wrap=lambda network: network, **options) -> float:
    """The largest difference between the plain loop and the stack after training."""
    own = own_networks(spec, options.get("dtype", torch.float32), len(work))

    def build(networks: list[nn.Module]) -> tuple[Stack, nn.Module]:
        stack, network = stack_of(networks)
        return stack, wrap(network)

    network = stacked(own, work, build=build, **options).network
    assert difference(network, [wrap(each) for each in own]) > 1e-3
    for each, job in zip(own, work, strict=True):
        plain(wrap(each), job, **options)
    return difference(network, [wrap(each) for each in own])


@pytest.mark.parametrize("precision", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("spec", ["cnn:width=8", "resnet8:width=8", "vit-tiny:width=32,depth=2", "BatchNorm"])
def test_clients_of_all_sizes(spec, precision):
    options, limit = precision
    spec = spec.replace("BatchNorm", "resnet8:width=8,norm=batch")
    assert after_training(spec, jobs(), **options) <= limit


@pytest.mark.parametrize("spec", ["cnn:width=8,norm=batch", "resnet20:width=8", "resnet32:width=8", "resnet56:width=8"])
def test_deeper_networks(spec):
    options, limit = DOUBLE
    assert after_training(spec, jobs((33, 1, 32, 31), pixels=8), **options) <= limit


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "mobilenet_v3_small"])
def test_networks_of_torchvision(name, monkeypatch):
    """Narrow ones. The MobileNets have dropout; each client draws what it draws on its own."""
    library = pytest.importorskip("torchvision").models

    def build(*_):
        if name == "resnet":
            return library.ResNet(library.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
        return library.get_model(name, width_mult=0.25, num_classes=10)

    monkeypatch.setattr(models, "build", build)
    options, limit = DOUBLE
    assert after_training("", jobs((31, 1, 33), pixels=32), **options | {"rate": 1e-3}) <= limit


def test_penalties():
    """FedProx for one client, SCAFFOLD for another, none for the rest."""
    start = own_networks("cnn:width=8", torch.float64)[0].state_dict()
    slope = {name: 0.1 * torch.ones_like(tensor) for name, tensor in start.items()}

    def penalty(client: int) -> loop.Penalty | None:
        return {0: loop.linear(slope), 2: loop.proximal(0.5, start)}.get(client)

    options, limit = DOUBLE
    assert after_training("cnn:width=8", jobs(penalty=penalty), **options) <= limit


def test_joint_training_on_labels_and_soft_labels():
    """As in Cronus: the loss selects samples by their targets, and the images with soft labels are not augmented."""
    generator = torch.Generator().manual_seed(9)
    work = []
    for job in jobs():
        soft = torch.randn(len(job.targets), 10, generator=generator).softmax(-1)
        labels = F.one_hot(job.targets, 10).float()
        work.append(
            dataclasses.replace(
                job,
                pixels=torch.cat([job.pixels, job.pixels.flip(1)]),
                targets=torch.cat([F.pad(labels, (0, 1)), F.pad(soft, (0, 1), value=1.0)]),
                objective=trainer._joint(F.cross_entropy, cross_entropy),
                augmentation=Augmentation(True, True, first=len(job.pixels)),
            )
        )
    options, limit = DOUBLE
    assert after_training("cnn:width=8", work, **options) <= limit


def test_objectives_on_embeddings():
    def objective(client: int) -> loop.Objective:
        return lambda output, labels: F.cross_entropy(output[0], labels) + client * output[1].square().mean()

    options, limit = DOUBLE
    assert after_training("cnn:width=8", jobs(objective=objective), wrap=Embedded, **options) <= limit


@pytest.mark.parametrize("term", [Features("hint"), Features("vid"), Features("attention"), Relations("rkd")])
def test_losses_on_layers_of_a_teacher(term):
    """As in ``mentor``: each client has its own teacher, and its own adapters with an optimizer of their own."""
    options, limit = DOUBLE
    dtype, rate, work = options["dtype"], options["rate"], jobs((31, 1, 70, 33))
    students, teachers = own_networks("cnn:width=8", count=4), own_networks("resnet8:width=8,norm=batch", count=4)
    for network in (*students, *teachers):
        network.to(dtype)
    both = []
    for student, teacher, job in zip(students, teachers, work, strict=True):
        sample = SCALING(job.pixels[:2]).to(dtype)
        teacher.eval().requires_grad_(False)
        both.append(DistillationObjective(student, [teacher], [term], sample, job.targets).to(dtype))
    adapters = copy.deepcopy([each.terms.state_dict() for each in both])

    def build(networks: list[nn.Module]) -> tuple[Stack, nn.Module]:
        stack, student = stack_of(networks)
        teacher = stack.add(teachers[0], [each.state_dict() for each in teachers[: len(networks)]])
        watched = WatchedModel(student, both[0].student.names), WatchedModel(teacher, both[0].teachers[0].names)
        return stack, Taught(watched[0], [watched[1]])

    work = [
        dataclasses.replace(
            job,
            targets=torch.stack([job.targets, torch.arange(len(job.targets))], 1),
            objective=each.loss,
            step=sgd(list(each.terms.parameters()), rate)[0] if adapters[0] else None,
        )
        for job, each in zip(work, both, strict=True)
    ]
    student = stacked(students, work, build=build, **options).network.student.model
    trained = [each.terms.state_dict() for each in copy.deepcopy(both)]
    for each, job, state in zip(both, work, adapters, strict=True):
        each.terms.load_state_dict(state)
        plain(each, job, **options)
        state.update(each.terms.state_dict())
    assert difference(student, students) <= limit
    for ours, theirs in zip(trained, adapters, strict=True):
        assert all((ours[name] - theirs[name]).abs().max() <= limit for name in theirs)


def test_distillation_with_adam_and_averaged_weights():
    options, limit = DOUBLE
    work = jobs(augmentation=lambda _: Augmentation())
    assert after_training("cnn:width=8", work, optimizer=adam, average=True, epochs=3, **options) <= limit


def test_clients_leave_or_stay_with_the_same_result(monkeypatch):
    """Those that are done stay in the stack to the end if there is no smaller one."""
    results, logits = [], []
    for sizes in ((1, 2, 3, 4), (2, 3), ()):
        monkeypatch.setattr(stacked_loop, "SIZES", sizes)
        own = own_networks("resnet8:width=8,norm=batch", torch.float64)
        trained = stacked(own, jobs(), dtype=torch.float64)
        results.append(trained.stack.weights(trained.network))
        images = [job.pixels for job in jobs()]
        logits.append(stacked_loop.predict(trained.network, trained.stack, images, to_double))
    for one, *others in zip(*results, strict=True):
        assert all((one[name] - other[name]).abs().max() <= 1e-10 for other in others for name in one)
    for one, *others in zip(*logits, strict=True):
        assert all(torch.allclose(one, other) for other in others)


def test_two_runs_give_the_same_bits_and_torchs_own_random_numbers_are_not_drawn():
    results = []
    before = torch.get_rng_state()
    for _ in range(2):
        own = own_networks("resnet8:width=8,norm=batch")
        results.append(stacked(own, jobs()).stack.tensors)
    assert all(map(torch.equal, *results))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spec", ["cnn:width=8,norm=batch", "vit-tiny:width=32,depth=2"])
def test_prediction(spec):
    own = own_networks(spec, count=3)
    stack, network = stack_of(own)
    images = [job.pixels for job in jobs((70, 1, 33))]
    for pixels in (images, [images[0]] * 3):
        seen = stacked_loop.predict(network.train(), stack, pixels, SCALING)
        for logits, each, its in zip(seen, own, pixels, strict=True):
            assert torch.allclose(logits, loop.predict(each, its, SCALING), atol=1e-5)
            assert not logits.is_inference()


class Scaled(nn.Module):
    """A container with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Scaled(), "Scaled"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "Conv2d"),
        (nn.InstanceNorm2d(3, affine=True), "InstanceNorm2d"),
        (nn.BatchNorm2d(3, affine=False, track_running_stats=False), "BatchNorm2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), "ParametrizedConv2d"),
        (nn.GRU(3, 3), "GRU"),
    ],
)
def test_what_cannot_be_stacked_is_refused(layer, name):
    with pytest.raises(NotStackable, match=rf"0 \({name}\)"):
        stack_of([nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(10))])


class Centered(nn.Module):
    """A sample depends on the others of its batch."""

    def forward(self, x):
        return x - x.mean(0)


class Functional(nn.Conv2d):
    """A container that uses the weights of a layer itself."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return F.conv2d(x, 2 * self.layer.weight)


@pytest.mark.parametrize(("layer", "message"), [(Centered(), "differ"), (Functional(), "fails"), (nn.GRU(3, 3), "GRU")])
def test_a_stack_is_compared_with_its_networks(layer, message):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rest = [nn.Dropout(0.3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)]
    check(nn.Sequential(*rest), x)
    with pytest.raises(NotStackable, match=message):
        check(nn.Sequential(layer, nn.AdaptiveAvgPool2d(8), *rest), x)


@pytest.mark.parametrize("drawing", [nn.Dropout2d(0.5), nn.RReLU()])
def test_a_network_that_draws_random_numbers_is_refused(drawing):
    network = nn.Sequential(drawing, nn.Flatten(), nn.Linear(3 * 256, 10))
    with pytest.raises(NotStackable, match="random numbers"):
        stacked([network, network], jobs((8, 8)))


def test_layers_that_share_a_parameter_share_it_in_the_stack():
    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.Linear(4, 4), layer)
    tied[1].weight = layer.weight
    _, network = stack_of([tied, tied])
    assert network[1].weight is network[0].weight
    assert network[2] is network[0]
    assert len(list(network.parameters())) == 3


def recorded(monkeypatch) -> list:
    """Pretend that the device records steps: a replay does what the recorded step did. Returns the recorded steps."""
    steps: list = []

    def record(run):
        steps.append(run)
        return run

    monkeypatch.setattr(graphs, "recorder", lambda device: record)
    return steps


def train_again(
    spec: str, count: int, sizes: tuple[int, ...], device: str = "cpu", build=None, **options
) -> list[torch.Tensor]:
    """The results of several trainings of one learner, each from the same weights on other images."""
    own = [each.to(device) for each in own_networks(spec, torch.float64, len(sizes))]
    learners: dict[int, Learner] = {}

    def learner(count: int) -> Learner:
        if count not in learners:
            learners[count] = learner_of(own[:count], build=build)
        for tensor in learners[count].state:
            tensor.zero_()
        return learners[count]

    results: list[torch.Tensor] = []
    for seed in range(count):
        trained = learner(len(sizes))
        trained.stack.load(trained.network, [each.state_dict() for each in own])
        work = jobs([size - size // 4 * (seed % 2) for size in sizes], seed=lambda k, seed=seed: 10 * seed + k)
        for job in work[1:]:
            job.pixels.copy_(job.pixels + 100 * seed)
        stacked_loop.train(trained, work, to_double, epochs=2, batch_size=32, smaller=learner, **options)
        results += [tensor.detach().clone() for tensor in trained.stack.tensors]
    return results


def to_double(pixels: torch.Tensor) -> torch.Tensor:
    return SCALING(pixels).double()


@pytest.mark.parametrize(("sizes", "count"), [((64, 64, 64), 1), ((63, 64, 40), 2), ((31, 1, 200, 33, 32), 4)])
def test_a_step_is_recorded_once_for_all_trainings(sizes, count, monkeypatch):
    """Once for each size of the stack and width of its batches, whatever the number of samples."""
    expected = train_again("resnet8:width=8,norm=batch", 4, sizes, record=False)
    steps = recorded(monkeypatch)
    seen = train_again("resnet8:width=8,norm=batch", 4, sizes)
    assert all(map(torch.equal, seen, expected))
    assert len(steps) == count


def alone(networks: list[nn.Module]) -> tuple[Stack, nn.Module]:
    (network,), stack = copy.deepcopy(networks), Stack(1)
    return stack, stack.alone(network)


@pytest.mark.parametrize(
    ("size", "spec", "count"),
    [
        (64, "cnn:width=8", 1),
        (70, "cnn:width=8", 1),
        (70, "resnet8:width=8,norm=batch", 1),
        (65, "resnet8:width=8,norm=batch", 2),  # batches of 32 and 33 images, then of 32 and 17
        (20, "resnet8:width=8,norm=batch", 2),
    ],
)
def test_one_client_is_trained_by_the_layers_of_its_own_network(size, spec, count, monkeypatch):
    """There is no padding: a batch that is smaller (or larger, with BatchNorm) than the first one is not recorded."""
    steps = recorded(monkeypatch)
    seen = train_again(spec, 2, (size,), build=alone)
    assert len(steps) == count
    expected = []
    for seed in range(2):
        own = module(spec, 0, torch.float64)
        (job,) = jobs([size - size // 4 * (seed % 2)], seed=lambda k, seed=seed: 10 * seed + k)
        plain(own, job, dtype=torch.float64)
        expected += [*own.parameters(), *own.buffers()]
    assert all(torch.allclose(mine[0], its, 0, 1e-10) for mine, its in zip(seen, expected, strict=True))


def test_what_cannot_be_recorded_is_run_step_by_step(monkeypatch, capsys):
    expected = train_again("cnn:width=8", 1, (64, 64))
    monkeypatch.setattr(graphs, "recorder", lambda device: _refuse)
    assert all(map(torch.equal, train_again("cnn:width=8", 1, (64, 64)), expected))
    assert "cannot be recorded as a CUDA graph, so it is slower: not permitted\n" in capsys.readouterr().err


def _refuse(_):
    raise RuntimeError("not permitted\nCUDA says more.")


@pytest.mark.parametrize("change", ["objective", "dropout", "step"])
def test_steps_that_differ_in_python_are_not_recorded(change, monkeypatch):
    steps = recorded(monkeypatch)
    work = jobs((64, 64))
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5 * (change == "dropout")), nn.Linear(768, 10))
    if change == "objective":
        work[1] = dataclasses.replace(work[1], objective=lambda output, targets: F.cross_entropy(output, targets))
    if change == "step":
        work[1] = dataclasses.replace(work[1], step=lambda: None)
    stacked([network, network], work)
    assert not steps


@pytest.mark.parametrize("objective", stacked_loop.SAMPLE_LOSSES)
def test_one_loss_for_all_clients_equals_that_of_each_client(objective):
    options, limit = DOUBLE
    work = jobs(objective=lambda _: objective)
    if objective is not F.cross_entropy:
        generator = torch.Generator().manual_seed(0)
        soft = [torch.randn(len(job.targets), 10, generator=generator).double().softmax(-1) for job in work]
        work = [dataclasses.replace(job, targets=targets) for job, targets in zip(work, soft, strict=True)]
    assert after_training("cnn:width=8", work, **options) <= limit


@pytest.mark.parametrize("spec", ["cnn:width=8", "resnet8:width=8,norm=batch", "vit-tiny:width=32,depth=2"])
def test_activations_in_bfloat16(spec):
    """Weights and logits stay float32; a step differs by the rounding of activations."""
    own = own_networks(spec, count=2)
    x, labels = SCALING(jobs((8,))[0].pixels).repeat(2, 1, 1, 1), jobs((8,))[0].targets.repeat(2)
    results = []
    for precision in ("float32", "bfloat16"):
        stack, types = Stack(2, precision), set()
        network = stack.add(own[0], [each.state_dict() for each in own])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _, __, output, types=types: types.add(output.dtype))
        logits = network(x)
        assert logits.dtype == torch.float32
        assert types == {torch.bfloat16 if precision == "bfloat16" else torch.float32}
        F.cross_entropy(logits, labels).backward()
        results.append(torch.cat([logits.detach().flatten(), *(p.grad.flatten() for p in network.parameters())]))
    assert 0 < (results[0] - results[1]).norm() < 0.05 * results[0].norm()


def test_products_have_the_precision_of_the_stack_only_while_it_computes():
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    for precision in ("float32", "tf32"):
        with Stack(1, precision).computing():
            assert [each.allow_tf32 for each in settings] == [precision == "tf32"] * 2
        assert [each.allow_tf32 for each in settings] == before


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """As in a run: what no kernel of ours computes (float64) is computed by cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@needs_gpu
@pytest.mark.parametrize("spec", ["cnn:width=8", "resnet8:width=8,norm=batch", "vit-tiny:width=32,depth=2"])
def test_on_a_gpu_stacked_equals_plain_and_two_runs_give_the_same_bits(spec):
    options, limit = DOUBLE
    own, runs = [each.cuda() for each in own_networks(spec, torch.float64)], []
    for _ in range(2):
        trained = stacked(own, jobs(), **options)
        runs.append(trained.stack.tensors)
    assert all(map(torch.equal, *runs))
    for each, job in zip(own, jobs(), strict=True):
        plain(each, job, **options)
    assert difference(trained.network, own) <= limit


@needs_gpu
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_no_step_waits_for_the_gpu(optimizer, monkeypatch):
    """After the first one of the same clients, for which the batches are uploaded."""
    original = stacked_loop._steps

    def watched(*arguments):
        steps = original(*arguments)
        yield next(steps)
        while True:
            torch.cuda.set_sync_debug_mode("error")
            try:
                next(steps)
            except StopIteration:
                return
            finally:
                torch.cuda.set_sync_debug_mode("default")
            yield

    monkeypatch.setattr(stacked_loop, "_steps", watched)
    stacked([each.cuda() for each in own_networks("resnet8:width=8,norm=batch")], jobs(), optimizer=optimizer)


@needs_gpu
@pytest.mark.parametrize("sizes", [(128, 128, 128), (31, 1, 200, 33, 32)])
@pytest.mark.parametrize("spec", ["cnn:width=8", "resnet8:width=8,norm=batch", "vit-tiny:width=32,depth=2"])
def test_on_a_gpu_a_recorded_step_does_the_same(spec, sizes, monkeypatch):
    """Recorded in the first training, and replayed in the next one if no clients have left."""
    original, replays = graphs.record, []

    def record(*arguments):
        replay = original(*arguments)
        return lambda: (replays.append(1), replay())

    monkeypatch.setattr(graphs, "record", record)
    seen, expected = (train_again(spec, 3, sizes, device="cuda", record=record) for record in (True, False))
    assert len(replays) > 4
    assert all(map(torch.equal, seen, expected))


@needs_gpu
@pytest.mark.parametrize(("precision", "limit"), [("float32", 2e-4), ("tf32", 5e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("spec", ["cnn:width=8", "resnet8:width=16", "resnet8:width=16,norm=batch"])
def test_on_a_gpu_every_precision_is_close_to_the_plain_loop(spec, precision, limit):
    """Of float32 on the CPU; two runs give the same bits."""
    own, runs = own_networks(spec), []
    for _ in range(2):

        def build(networks: list[nn.Module]) -> tuple[Stack, nn.Module]:
            stack = Stack(len(networks), precision)
            return stack, stack.add(copy.deepcopy(own[0]).cuda(), [each.state_dict() for each in networks])

        network = (trained := stacked(own, jobs(), build=build, rate=1e-3)).network
        runs.append(trained.stack.tensors)
    assert all(map(torch.equal, *runs))
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    for each, job in zip(own, jobs(), strict=True):
        plain(each, job, rate=1e-3)
    assert difference(network, own) <= limit
