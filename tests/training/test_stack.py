"""Clients in a stack get the weights that each of them gets on its own, up to rounding."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedkd.algorithms.comet import COMET
from fedkd.algorithms.fd import by_label
from fedkd.algorithms.fedavg import FedProx
from fedkd.algorithms.fedproto import FedProto
from fedkd.algorithms.scaffold import linear
from fedkd.core import seeds, specs
from fedkd.core.catalog import CATALOG
from fedkd.training import graphs, loop, models, optimizers, stacked_loop
from fedkd.training.batches import Job
from fedkd.training.layers import WatchedModel
from fedkd.training.loop import Augmentation, Embedded, Scaling
from fedkd.training.losses.logits import cross_entropy, logit_mae, logit_mse
from fedkd.training.objectives import Bound, Joint, LabelSmoothed, Softened, of_samples
from fedkd.training.stack import NotStackable, Stack, check
from fedkd.training.stacked_loop import Learner
from fedkd.training.terms import Features, Logits, Relations
from fedkd.training.terms.objective import DistillationObjective, Taught, adapted_losses
from tests.conftest import slow
from tests.training import replays

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
        job = Job(images, labels, F.cross_entropy, Augmentation(True, True), seed=100 + k)
        made.append(dataclasses.replace(job, **{name: make(k) for name, make in changes.items()}))
    return made


def sgd(parameters: list[torch.Tensor]) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.sgd, parameters)
    return optimizers.sgd(parameters, 0.9, 1e-3, list(state)), state


def adam(parameters: list[torch.Tensor]) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.adam, parameters)
    step = optimizers.adam(parameters, state=state)
    return lambda rate: step(rate / 10), state


def clipping(parameters: list[torch.Tensor], *of_clients) -> tuple[optimizers.Step, list[torch.Tensor]]:
    """Gradients of one norm, which is smaller than most; in the plain loop by PyTorch."""
    step, state = sgd(parameters)
    if of_clients:
        return optimizers.clipped(step, parameters, 0.5, *of_clients), state

    def clipped_step(rate: float) -> None:
        nn.utils.clip_grad_norm_(parameters, 0.5)
        step(rate)

    return clipped_step, state


def plain(network: nn.Module, job: Job, *, optimizer=sgd, dtype=torch.float32, rate=0.02, **options) -> None:
    """Train by the plain loop."""
    loop.train(
        network,
        optimizer(list(network.parameters()))[0],
        job.pixels,
        job.targets,
        job.objective,
        lambda pixels: SCALING(pixels).to(dtype),
        augmentation=job.augmentation,
        seed=job.seed,
        penalty=job.penalty,
        **{"rates": [rate], "epochs": 2, "batch_size": 32} | options,
    )


def learner_of(networks: list[nn.Module], *, build=None, optimizer=sgd) -> Learner:
    """What trains a stack of these networks; ``build`` makes a stack and its network of them."""
    stack, network = (build or stack_of)(networks)
    of_clients = [stack.of_clients] if optimizer is clipping else []
    return Learner(network, stack, *optimizer(list(network.parameters()), *of_clients))


def stacked(networks: list[nn.Module], work: list[Job], *, build=None, optimizer=sgd, rate=0.02, **options) -> Learner:
    """Train a stack of these networks, which stay as they are."""

    def learner(count: int) -> Learner:
        return learner_of(networks[:count], build=build, optimizer=optimizer)

    dtype = options.pop("dtype", torch.float32)
    options = {"rates": [rate], "epochs": 2, "batch_size": 32, "smaller": learner} | options
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


OF_TABLES = ["bottleneck-resnet:width=8", "wrn-16-2:width=8,norm=batch", "resnet8x4:width=4", "resnet18:width=8"]
OF_TABLES += [
    "vgg8:width=8,norm=batch",
    "mobilenetv2:width=0.25",
    "lenet:projection=16,pixels=16",
    "mcmahan-cnn:gray=true",
]


@pytest.mark.parametrize("spec", OF_TABLES)
def test_models_of_published_tables(spec):
    options, limit = DOUBLE
    options |= {"rate": 2e-3} if spec.startswith("mobilenet") else {}
    assert after_training(spec, jobs((9, 1, 8), pixels=16 if "lenet" in spec else 8), **options) <= limit


@pytest.mark.parametrize("name", ["resnet", *map(slow, ("mobilenet_v2", "mobilenet_v3_small"))])
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


PENALTIES = {"fedprox": FedProx(mu=0.5).proximal, "scaffold": linear}


def penalty_of(method: str, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """A penalty with other tensors for each client, as of this method."""
    function = PENALTIES[method]
    weights = [each.state_dict() for each in own_networks("cnn:width=8", dtype)]
    return lambda k: Bound(function, {name: scale * tensor for name, tensor in weights[k].items()})


@pytest.mark.parametrize("method", ["fedprox", "scaffold"])
def test_penalties(method):
    options, limit = DOUBLE
    assert after_training("cnn:width=8", jobs(penalty=penalty_of(method, scale=0.3)), **options) <= limit


def test_penalties_that_differ_are_refused():
    own = own_networks("cnn:width=8", count=2)
    prox = penalty_of("fedprox", torch.float32)
    for penalty in ({0: prox(0)}.get, {0: prox(0), 1: penalty_of("scaffold", torch.float32)(1)}.get):
        with pytest.raises(NotStackable, match="penalties of clients differ"):
            stacked(own, jobs((8, 8), penalty=penalty))


def undeclared(logits, probs):
    """It does not say that it is a mean over samples."""
    return cross_entropy(logits, probs)


def joint_jobs(sizes: tuple[int, ...] = SIZES, soft_objective=cross_entropy, **changes) -> list[Job]:
    """As of Cronus: labels and soft labels in one batch; images with soft labels are not augmented."""
    generator = torch.Generator().manual_seed(9)
    work = []
    for job in jobs(sizes, **changes):
        soft = torch.randn(len(job.targets), 10, generator=generator).softmax(-1)
        labels = F.one_hot(job.targets, 10).float()
        work.append(
            dataclasses.replace(
                job,
                pixels=torch.cat([job.pixels, job.pixels.flip(1)]),
                targets=torch.cat([F.pad(labels, (0, 1)), F.pad(soft, (0, 1), value=1.0)]),
                objective=Joint(F.cross_entropy, soft_objective),
                augmentation=Augmentation(True, True, first=len(job.pixels)),
            )
        )
    return work


@pytest.mark.parametrize("soft_objective", [cross_entropy, COMET(weight=0.5).distance, undeclared])
def test_joint_training_on_labels_and_soft_labels(soft_objective):
    options, limit = DOUBLE
    assert after_training("cnn:width=8", joint_jobs(soft_objective=soft_objective), **options) <= limit


def test_smoothed_labels(monkeypatch):
    options, limit = DOUBLE
    smoothed = LabelSmoothed(0.3)
    assert after_training("cnn:width=8", jobs(objective=lambda _: LabelSmoothed(0.3)), **options) <= limit
    changes = {"changes": lambda _: {"objective": lambda _: smoothed}}
    expected = train_again("cnn:width=8", 2, (70, 33), record=False, **changes)
    monkeypatch.setattr(graphs, "recorder", replays.recorder)
    monkeypatch.setattr(replays.Replay, "count", 0)
    assert all(map(torch.equal, train_again("cnn:width=8", 2, (70, 33), **changes), expected))
    assert replays.Replay.count


def by_label_of(client: int) -> Bound:
    """As of FD, with other targets for each client."""
    targets = torch.rand(10, 10, generator=torch.Generator().manual_seed(client), dtype=torch.float64)
    return Bound(by_label, {"targets": torch.eye(10) + targets})


def prototypes_of(method: FedProto, width: int):
    """As of FedProto, with other prototypes for each client."""

    def objective(client: int) -> Bound:
        generator = torch.Generator().manual_seed(client)
        prototypes = torch.randn(10, width, generator=generator, dtype=torch.float64)
        return Bound(method.objective, {"prototypes": prototypes, "is_known": torch.arange(10) != client})

    return objective


@pytest.mark.parametrize("kind", ["closures", "prototypes", "labels"])
def test_objectives_with_tensors_of_each_client(kind):
    def closure(client: int) -> loop.Objective:
        return lambda output, labels: F.cross_entropy(output[0], labels) + client * output[1].square().mean()

    options, limit = DOUBLE
    objective, wrap = {
        "closures": (closure, Embedded),
        "prototypes": (prototypes_of(FedProto(weight=0.5), 256), Embedded),
        "labels": (by_label_of, lambda network: network),
    }[kind]
    assert after_training("cnn:width=8", jobs(objective=objective), wrap=wrap, **options) <= limit


class Mentored:
    """As in ``mentor``: students, each with its own teacher and its own adapters, and the stack of them."""

    def __init__(self, term, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        self.term, self.kind, count = term, {"dtype": dtype, "device": device}, len(sizes)
        self.students = [each.to(device) for each in own_networks("cnn:width=8", dtype, count)]
        self.teachers = [each.to(device) for each in own_networks("resnet8:width=8,norm=batch", dtype, count)]
        indices = [torch.arange(size) for size in sizes]
        self.jobs = [
            dataclasses.replace(job, targets=torch.stack([job.targets, each], 1))
            for job, each in zip(jobs(sizes), indices, strict=True)
        ]
        for teacher in self.teachers:
            teacher.eval().requires_grad_(False)

    def build(self, students: list[nn.Module]) -> tuple[Stack, nn.Module]:
        both, (stack, student) = self.objectives()[: len(students)], stack_of(students)
        teacher = stack.add(self.teachers[0], [each.state_dict() for each in self.teachers[: len(students)]])
        adapters = stack.add_parameters([each.terms.parameters() for each in both])
        watched = WatchedModel(student, both[0].student.names), [WatchedModel(teacher, both[0].teachers[0].names)]
        return stack, Taught(*watched, adapters)

    def stacked(self, **options) -> Learner:
        """Train the stack of all."""
        losses = adapted_losses(self.objectives())
        work = [dataclasses.replace(job, objective=loss) for job, loss in zip(self.jobs, losses, strict=True)]
        return stacked(self.students, work, build=self.build, **options)

    def objectives(self) -> list[DistillationObjective]:
        """New ones of the students, with the same adapters each time."""
        made = []
        with seeds.seeded(0):
            for student, teacher, job in zip(self.students, self.teachers, self.jobs, strict=True):
                sample = SCALING(job.pixels[:2]).to(**self.kind)
                made.append(DistillationObjective(student, [teacher], [self.term], sample, job.targets[:, 0]))
        return [each.to(**self.kind) for each in made]


@pytest.mark.parametrize(
    "term", [*map(Features, ("hint", "vid", "attention", "nst")), Logits(), Logits("dkd"), Relations("rkd")]
)
def test_losses_on_layers_of_a_teacher(term):
    options, limit = DOUBLE
    work = Mentored(term, (31, 1, 70, 33))
    trained = work.stacked(**options).network
    for k, (each, job) in enumerate(zip(work.objectives(), work.jobs, strict=True)):
        plain(each, dataclasses.replace(job, objective=each.loss), **options)
        for ours, theirs in zip(trained.adapters, each.terms.parameters(), strict=True):
            assert (ours[k] - theirs).abs().max() <= limit
    assert difference(trained.student.model, work.students) <= limit


@pytest.mark.parametrize("term", [Features("hint"), Features("vid"), Logits()])
def test_steps_with_a_teacher_are_recorded(term, monkeypatch):
    results = []
    for is_recorded in (False, True):
        if is_recorded:
            steps = recorded(monkeypatch)
        work = Mentored(term, (64, 63))
        results.append(work.stacked(dtype=torch.float64).stack.tensors)
    assert len(steps) == 1
    assert all(map(torch.equal, *results))


def test_distillation_with_adam_and_averaged_weights():
    options, limit = DOUBLE
    work = jobs(augmentation=lambda _: Augmentation())
    assert after_training("cnn:width=8", work, optimizer=adam, average=True, epochs=3, **options) <= limit


def test_the_average_of_no_epochs_is_the_start():
    """Also that of one client whose single sample BatchNorm cannot be trained on."""
    own = own_networks("resnet8:width=4,norm=batch", torch.float64, 2)
    for sizes, epochs in (((8, 8), 0), ((8, 1), 2)):
        trained = stacked(own, jobs(sizes), dtype=torch.float64, average=True, epochs=epochs)
        assert all(torch.equal(tensor, own[1].state_dict()[name]) for name, tensor in of(trained, 1).items())
        assert any(not torch.equal(tensor, own[0].state_dict()[name]) for name, tensor in of(trained, 0).items()) == (
            epochs > 0
        )


def of(learner: Learner, client: int) -> dict[str, torch.Tensor]:
    return learner.stack.weights(learner.network)[client]


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
    spec: str,
    count: int,
    sizes: tuple[int, ...],
    device: str = "cpu",
    build=None,
    optimizer=sgd,
    changes=lambda _: {},
    rates=lambda _: [0.02],
    **options,
) -> list[torch.Tensor]:
    """The results of several trainings of one learner, each from the same weights on other images.

    ``changes`` of the number of a training are those of its `jobs`, ``rates`` its learning rates.
    """
    own = [each.to(device) for each in own_networks(spec, torch.float64, len(sizes))]
    learners: dict[int, Learner] = {}

    def learner(count: int) -> Learner:
        if count not in learners:
            learners[count] = learner_of(own[:count], build=build, optimizer=optimizer)
        for tensor in learners[count].state:
            tensor.zero_()
        return learners[count]

    results: list[torch.Tensor] = []
    for seed in range(count):
        trained = learner(len(sizes))
        trained.stack.load(trained.network, [each.state_dict() for each in own])
        counts = sizes if changes(0) else [size - size // 4 * (seed % 2) for size in sizes]
        work = jobs(counts, seed=lambda k, seed=seed: 10 * seed + k, **changes(seed))
        for job in work[1:]:
            job.pixels.copy_(job.pixels + 100 * seed)
        options |= {"rates": rates(seed), "epochs": 2, "batch_size": 32, "smaller": learner}
        stacked_loop.train(trained, work, to_double, **options)
        results += [tensor.detach().clone() for tensor in trained.stack.tensors]
    return results


def to_double(pixels: torch.Tensor) -> torch.Tensor:
    return SCALING(pixels).double()


@pytest.mark.parametrize(("sizes", "count"), [slow((64, 64, 64), 1), slow((63, 64, 40), 2), ((31, 1, 200, 33, 32), 4)])
def test_a_step_is_recorded_once_for_all_trainings(sizes, count, monkeypatch):
    """Once for each size of the stack and width of its batches, whatever the number of samples."""
    expected = train_again("resnet8:width=8,norm=batch", 4, sizes, record=False)
    steps = recorded(monkeypatch)
    seen = train_again("resnet8:width=8,norm=batch", 4, sizes)
    assert all(map(torch.equal, seen, expected))
    assert len(steps) == count


def nesterov(parameters: list[torch.Tensor]) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.sgd, parameters)
    return optimizers.sgd(parameters, 0.9, 1e-3, list(state), nesterov=True), state


def adamw(parameters: list[torch.Tensor]) -> tuple[optimizers.Step, list[torch.Tensor]]:
    state = optimizers.state_of(optimizers.adamw, parameters)
    step = optimizers.adamw(parameters, 0.1, state, beta1=0.8)
    return lambda rate: step(rate / 10), state


@pytest.mark.parametrize("optimizer", [sgd, nesterov, adam, adamw, clipping])
def test_learning_rates_are_new_in_each_training(optimizer, monkeypatch):
    """Rates of the round and of each step; clients that are done leave the stack."""
    options = {"rates": lambda number: [[0.02], [0.05], [0.01 * step for step in range(8)]][number]}
    sizes = (64, 64, 96)
    expected = train_again("cnn:width=8", 3, sizes, optimizer=optimizer, record=False, **options)
    monkeypatch.setattr(graphs, "recorder", replays.recorder)
    monkeypatch.setattr(replays.Replay, "count", 0)
    seen = train_again("cnn:width=8", 3, sizes, optimizer=optimizer, **options)
    assert all(map(torch.equal, seen, expected))
    assert replays.Replay.count > 8
    assert not torch.equal(seen[0], seen[len(seen) // 3])


@pytest.mark.parametrize("optimizer", [sgd, nesterov, adam, adamw, clipping])
def test_clients_of_all_sizes_with_a_rate_of_each_step(optimizer):
    options, limit = DOUBLE
    options |= {"optimizer": optimizer, "rates": [0.02 * 0.9**step for step in range(6)]}
    assert after_training("cnn:width=8", jobs(), **options) <= limit


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_clients_of_all_sizes_with_the_same_number_of_steps(steps, monkeypatch):
    """Clients with one batch or seven, whose last batches are smaller. Recorded, the same to the bit."""
    options, limit = DOUBLE
    assert after_training("cnn:width=8", jobs(), steps=steps, **options) <= limit
    expected = train_again("cnn:width=8", 2, (70, 33), record=False, steps=steps)
    monkeypatch.setattr(graphs, "recorder", replays.recorder)
    assert all(map(torch.equal, train_again("cnn:width=8", 2, (70, 33), steps=steps), expected))


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


BOUND = {
    "fedprox": lambda number: {"penalty": penalty_of("fedprox", scale=number)},
    "scaffold": lambda number: {"penalty": penalty_of("scaffold", scale=number / 10)},
    "fd": lambda number: {"objective": lambda k: by_label_of(k + 10 * number)},
    "cronus": lambda number: {
        "objective": lambda _: Joint(F.cross_entropy, LOSSES["kl"]),
        "targets": lambda k: torch.cat([soft_targets(64, k + number), torch.arange(64)[:, None] % 2], 1),
    },
    "rkd": lambda number: {"objective": lambda _: LOSSES["rkd"], "targets": lambda k: soft_targets(64, k + number)},
}


@pytest.mark.parametrize("method", BOUND)
def test_tensors_of_penalties_and_objectives_are_new_in_each_training(method, monkeypatch):
    options = {"changes": BOUND[method]}
    expected = train_again("cnn:width=8", 3, (64, 64), record=False, **options)
    steps = recorded(monkeypatch)
    assert all(map(torch.equal, train_again("cnn:width=8", 3, (64, 64), **options), expected))
    assert len(steps) == 1


def test_what_cannot_be_recorded_is_run_step_by_step(monkeypatch, capsys):
    expected = train_again("cnn:width=8", 1, (64, 64))
    monkeypatch.setattr(graphs, "recorder", lambda device: _refuse)
    assert all(map(torch.equal, train_again("cnn:width=8", 1, (64, 64)), expected))
    assert "cannot be recorded as a CUDA graph, so it is slower: not permitted\n" in capsys.readouterr().err


def _refuse(_):
    raise RuntimeError("not permitted\nCUDA says more.")


@pytest.mark.parametrize("change", ["objective", "dropout"])
def test_steps_that_differ_in_python_are_not_recorded(change, monkeypatch):
    steps = recorded(monkeypatch)
    work = jobs((64, 64))
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5 * (change == "dropout")), nn.Linear(768, 10))
    if change == "objective":
        work[1] = dataclasses.replace(work[1], objective=lambda output, targets: F.cross_entropy(output, targets))
    stacked([network, network], work)
    assert not steps


def soft_jobs(objective, sizes: tuple[int, ...] = SIZES) -> list[Job]:
    """Distillation from soft labels."""
    return jobs(sizes, objective=lambda _: objective, targets=lambda k: soft_targets(sizes[k], k))


def soft_targets(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


LOSSES = {name: Softened(specs.bind("loss", name), 2.0) for name in CATALOG["loss"]}
MEANS = {name: loss for name, loss in LOSSES.items() if of_samples(loss)} | {"mae": logit_mae, "square": logit_mse}


def test_which_losses_are_means_over_samples():
    """Those that say so, and no others."""
    generator = torch.Generator().manual_seed(0)
    logits, probs = torch.randn(9, 10, generator=generator), torch.randn(9, 10, generator=generator).softmax(-1)
    for name, loss in (LOSSES | MEANS).items():
        mean = torch.stack([loss(*rows) for rows in zip(logits.split(1), probs.split(1), strict=True)]).mean()
        assert torch.allclose(loss(logits, probs), mean, 1e-4) == (name in MEANS), name
        if each := of_samples(loss):
            assert torch.allclose(each(logits, probs).mean(), mean, 1e-6), name
    assert len(MEANS) == 7
    assert of_samples(specs.bind("loss", "dkd:alpha=2"))


@pytest.mark.parametrize("name", MEANS)
def test_one_loss_for_all_clients_equals_that_of_each_client(name):
    options, limit = DOUBLE
    assert after_training("cnn:width=8", soft_jobs(MEANS[name]), **options) <= limit


@pytest.mark.parametrize("name", LOSSES)
def test_one_loss_for_all_batches_of_one_size_equals_that_of_each_client(name):
    """Whether it is a mean over samples or not. The last batch of an epoch is smaller, and one client has one batch."""
    options, limit = DOUBLE
    assert after_training("cnn:width=8", soft_jobs(LOSSES[name], (48, 32, 48)), **options) <= limit


class Count(TorchDispatchMode):
    """Counts calls of operators."""

    calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "work",
    [
        lambda sizes: jobs(sizes),
        lambda sizes: jobs(sizes, penalty=penalty_of("fedprox", torch.float32)),
        lambda sizes: jobs(sizes, penalty=penalty_of("scaffold", torch.float32)),
        lambda sizes: jobs(sizes, objective=by_label_of),
        lambda sizes: joint_jobs(sizes),
        lambda sizes: soft_jobs(logit_mae, sizes),
        lambda sizes: soft_jobs(LOSSES["dkd"], sizes),
        lambda sizes: soft_jobs(LOSSES["rkd"], sizes),
        lambda sizes: Mentored(Features("hint"), sizes, torch.float32),
    ],
    ids=["fedavg", "fedprox", "scaffold", "fd", "cronus", "fedmd", "dkd", "rkd", "mentor"],
)
def test_a_step_calls_as_many_operators_for_many_clients_as_for_two(work, monkeypatch):
    original, counts = stacked_loop._steps, []

    def counted(*arguments):
        steps = original(*arguments)
        yield next(steps)
        with Count() as count:
            next(steps)
        counts.append(count.calls)
        yield
        yield from steps

    monkeypatch.setattr(stacked_loop, "_steps", counted)
    for clients in (2, 5):
        made = work((64,) * clients)
        if isinstance(made, Mentored):
            made.stacked()
        else:
            stacked(own_networks("cnn:width=8", count=clients), made)
    assert counts[0] == counts[1]


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


needs_gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """As in a run: what no kernel of ours computes (float64) is computed by cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@needs_gpu
@pytest.mark.parametrize("optimizer", [sgd, nesterov, adam, adamw, clipping])
def test_on_a_gpu_learning_rates_are_new_in_each_training(optimizer, monkeypatch):
    options = {"rates": lambda number: [[0.02], [0.05]][number], "optimizer": optimizer, "device": "cuda"}
    expected = train_again("cnn:width=8", 2, (64, 64), record=False, **options)
    record, recordings = graphs.record, []
    monkeypatch.setattr(graphs, "record", lambda *arguments: (recordings.append(1), record(*arguments))[1])
    assert all(map(torch.equal, train_again("cnn:width=8", 2, (64, 64), **options), expected))
    assert len(recordings) == 1


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
@pytest.mark.parametrize("method", BOUND)
def test_on_a_gpu_penalties_and_objectives_are_recorded(method, monkeypatch, capsys):
    original, records = graphs.record, []
    monkeypatch.setattr(graphs, "record", lambda *arguments: (records.append(1), original(*arguments))[1])
    options = {"device": "cuda", "changes": BOUND[method]}
    seen, expected = (train_again("cnn:width=8", 3, (64, 64), record=record, **options) for record in (True, False))
    assert len(records) == 1
    assert all(map(torch.equal, seen, expected))
    assert "cannot be recorded" not in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("term", [Features("hint"), Features("vid"), Logits()])
def test_on_a_gpu_steps_with_a_teacher_are_recorded(term, capsys):
    results = []
    for record in (True, False):
        trained = Mentored(term, (64, 63), device="cuda").stacked(dtype=torch.float64, record=record)
        results.append(trained.stack.tensors)
        assert any(trained.recordings.values()) == record
    assert all(map(torch.equal, *results))
    assert "cannot be recorded" not in capsys.readouterr().err


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
