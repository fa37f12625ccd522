"""Each method against slow reference implementations and published identities."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedkd.algorithms import density_ratio, fedbe, fedgems, fedmd, scaffold, scarlet, selective_fd
from fedkd.algorithms.base import Update
from fedkd.core import specs, tensors
from fedkd.core.errors import RunError, UsageError
from fedkd.core.soft_labels import SoftLabels
from fedkd.core.tensors import equal, shapes, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models
from fedkd.training.trainer import Trainer
from tests.conftest import simulated, slow, tiny

PROBS = torch.full((40, 10), 0.1)
EXACT = "donot_use_mm_for_euclid_dist"


def call(name):
    return specs.call("algorithm", name)


def weights_of(setup, count, scale=0.05):
    """Client models: the initial one, each with its own noise."""
    generator = torch.Generator().manual_seed(3)
    start = setup.trainer.initial_weights(setup.student)
    return [{n: w + scale * torch.randn(w.shape, generator=generator) for n, w in start.items()} for _ in range(count)]


def recording(setup):
    """The same setup with a trainer that does not train, and the list of its calls: (client, keyword arguments)."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Recording(Trainer):
        def train(self, client, weights, **options):
            calls.append((client, options))
            return dict(weights)

    fields = {field.name: getattr(setup.trainer, field.name) for field in dataclasses.fields(setup.trainer)}
    return dataclasses.replace(setup, trainer=Recording(**fields)), calls


@pytest.fixture(scope="module")
def setup():
    return prepare(tiny()).setup


# -- methods that upload weights ---------------------------------------------------------------------------------


def test_one_step_of_feddf_is_the_step_written_out():
    """Adam on KL(softmax(mean of logits) || softmax(student)), from the weighted mean (Lin et al., 2020)."""
    setup = prepare(tiny(distill_batch_size=40, model="cnn:width=8")).setup
    clients, sizes = weights_of(setup, 3), [10, 20, 70]
    updates = {k: Update(w, n) for k, (w, n) in enumerate(zip(clients, sizes, strict=True))}
    algorithm = call("feddf")
    ours = algorithm.global_model(setup, algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1))

    images = setup.trainer.scaling(setup.proxy.images)
    module = models.build(setup.student, setup.classes, setup.config.norm)
    with torch.no_grad():
        answers = []
        for weights in clients:
            module.load_state_dict(weights)
            answers.append(module(images))
        teacher = torch.stack(answers).mean(0).softmax(-1)
        module.load_state_dict(
            {n: sum(w[n] * s for w, s in zip(clients, sizes, strict=True)) / 100 for n in clients[0]}
        )
    adam = torch.optim.Adam(module.parameters(), setup.config.distill_learning_rate)
    functional.kl_div(module(images).log_softmax(-1), teacher, reduction="batchmean").backward()
    adam.step()
    for name, tensor in module.state_dict().items():
        assert torch.allclose(ours[name], tensor, atol=2e-6), name


def test_feddf_without_distillation_is_fedavg():
    setup = prepare(tiny(distill_epochs=0)).setup
    updates = {k: Update(w, 5 + k) for k, w in enumerate(weights_of(setup, 3))}
    df, average = call("feddf"), call("fedavg")
    ours = df.global_model(setup, df.aggregate(setup, df.initial_state(setup), updates, seed=1))
    assert tensors.equal(ours, average.aggregate(setup, average.initial_state(setup), updates, seed=1))


def test_feddf_averages_within_an_architecture_and_distills_across():
    setup = prepare(tiny(model="cnn:width=8,cnn:width=16", student="resnet8:width=8", distill_epochs=0)).setup
    algorithm = call("feddf")
    state = algorithm.initial_state(setup)
    updates = {
        k: Update({n: w + k for n, w in setup.trainer.initial_weights(setup.model_of(k)).items()}, 1) for k in range(3)
    }
    new = algorithm.aggregate(setup, state, updates, seed=1)
    first = setup.trainer.initial_weights("cnn:width=8")
    assert all(torch.allclose(tensors.take("group0", new)[n], first[n] + 1, atol=1e-6) for n in first)
    assert tensors.equal(algorithm.global_model(setup, new), setup.trainer.initial_weights("resnet8:width=8"))
    alone = algorithm.aggregate(setup, new, {1: updates[1]}, seed=2)  # no participant has the first architecture
    assert tensors.equal(tensors.take("group0", alone), tensors.take("group0", new))


def test_a_mentor_of_weight_zero_gives_fedavg(setup):
    """Bitwise: the same samples in the same order, plus zero."""
    experiment = prepare(tiny())
    held = experiment.client(0, 1, {})
    start = experiment.setup.trainer.initial_weights(experiment.setup.student)
    plain, _ = call("fedavg").local_update(experiment.setup, held, start)
    silent, _ = call("mentor:model=cnn:width=4,term=logits,weight=0").local_update(experiment.setup, held, start)
    assert equal(plain.tensors, silent.tensors)


@pytest.mark.parametrize("term", ["logits", "features", "relations", "graph", "contrastive"])
def test_a_mentor_stays_on_its_client_and_changes_the_student(term):
    experiment = prepare(tiny(validation=1200))
    setup, mentor = experiment.setup, call(f"mentor:model=resnet8,term={term}")
    start = setup.trainer.initial_weights(setup.student)
    first, memory = mentor.local_update(setup, experiment.client(0, 1, {}), start)
    plain, _ = call("fedavg").local_update(setup, experiment.client(0, 1, {}), start)
    assert shapes(first.tensors) == mentor.upload_spec(setup, 0, 1)
    assert not equal(first.tensors, plain.tensors)
    assert equal(take("model", memory), first.tensors)
    _, again = mentor.local_update(setup, experiment.client(0, 2, memory), first.tensors)
    assert not equal(take("mentor", memory), take("mentor", again))
    if term in ("features", "graph", "contrastive"):  # what was learned goes on from where it was
        forgetful = {name: tensor for name, tensor in memory.items() if not name.startswith("adapters/")}
        _, fresh = mentor.local_update(setup, experiment.client(0, 2, forgetful), first.tensors)
        assert not equal(take("adapters", again), take("adapters", fresh))


@pytest.mark.parametrize("width", [4, 8])
def test_a_student_with_a_mentor_starts_from_the_global_weights(width):
    """For any architecture of the mentor, also the student's: with a tiny learning rate, the weights hardly change."""
    experiment = prepare(tiny(learning_rate=1e-9))
    setup = experiment.setup
    came = {name: tensor + 1 for name, tensor in setup.trainer.initial_weights(setup.student).items()}
    update, _ = call(f"mentor:model=cnn:width={width}").local_update(setup, experiment.client(0, 1, {}), came)
    assert all(torch.allclose(update.tensors[name], came[name], atol=1e-6) for name in came)


def test_the_contrastive_term_is_zero_on_one_class():
    experiment = prepare(tiny(partitioner="pathological:classes=1"))
    setup, start = experiment.setup, experiment.setup.trainer.initial_weights(experiment.setup.student)
    client = experiment.client(0, 1, {})
    assert len(client.data.labels.unique()) == 1
    plain, _ = call("fedavg").local_update(setup, client, start)
    with_teacher, _ = call("mentor:model=cnn:width=4,term=contrastive").local_update(setup, client, start)
    assert equal(with_teacher.tensors, plain.tensors)


def test_a_mentor_of_the_same_architecture_is_another_network():
    experiment = prepare(tiny())
    update, memory = call("mentor:model=cnn:width=8").local_update(
        experiment.setup,
        experiment.client(0, 1, {}),
        experiment.setup.trainer.initial_weights(experiment.setup.student),
    )
    assert not equal(update.tensors, take("mentor", memory))


def test_fedavgm_without_momentum_is_fedavg_and_accumulates_velocity_with_it(setup):
    clients = weights_of(setup, 2)
    updates = {k: Update(w, 5) for k, w in enumerate(clients)}
    average, plain, moving = call("fedavg"), call("fedavgm:beta=0.0"), call("fedavgm:beta=0.9")
    mean = average.aggregate(setup, average.initial_state(setup), updates, 1)
    once = plain.aggregate(setup, plain.initial_state(setup), updates, 1)
    assert all(torch.allclose(plain.global_model(setup, once)[n], mean[n], atol=1e-6) for n in mean)
    state = moving.aggregate(setup, moving.initial_state(setup), updates, 1)
    state = moving.aggregate(setup, state, updates, 2)
    start = setup.trainer.initial_weights(setup.student)
    for name, weight in start.items():  # by hand: v1 = x0 - m, x1 = m; v2 = 0.9 v1 + x1 - m = 0.9 v1; x2 = m - 0.9 v1
        expected = mean[name] - 0.9 * (weight - mean[name])
        assert torch.allclose(moving.global_model(setup, state)[name], expected, atol=1e-5)


def test_a_control_variate_is_the_clients_gradient():
    """After one step of plain SGD, c_i is the gradient at the start (option II with K = 1)."""
    experiment = prepare(
        tiny(algorithm="scaffold", batch_size=4096, momentum=0.0, weight_decay=0.0, augment=False, model="cnn:width=8")
    )
    setup, client = experiment.setup, experiment.client(0, 1, {})
    algorithm = experiment.algorithm
    update, memory = algorithm.local_update(setup, client, algorithm.initial_state(setup))
    module = models.build(setup.student, setup.classes, setup.config.norm)
    module.load_state_dict(setup.trainer.initial_weights(setup.student))
    functional.cross_entropy(module(setup.trainer.scaling(client.data.pixels)), client.data.labels).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(tensors.take("control", memory)[name], parameter.grad, atol=2e-4), name
    assert tensors.equal(tensors.take("control", update.tensors), tensors.take("control", memory))


def test_the_correction_replaces_the_clients_gradient_by_the_common_one():
    experiment = prepare(
        tiny(algorithm="scaffold", batch_size=4096, momentum=0.0, weight_decay=0.0, augment=False, model="cnn:width=8")
    )
    setup, algorithm = experiment.setup, experiment.algorithm
    start = algorithm.initial_state(setup)
    _, memory = algorithm.local_update(setup, experiment.client(0, 1, {}), start)
    common = {name: torch.full_like(c, 0.01) for name, c in tensors.take("control", start).items()}
    request = {**start, **tensors.put("control", common)}
    update, _ = algorithm.local_update(setup, experiment.client(0, 2, memory), request)
    for name, weight in tensors.take("student", update.tensors).items():  # g - c_i + c = c here, since g = c_i
        expected = setup.trainer.initial_weights(setup.student)[name] - setup.config.learning_rate * 0.01
        assert torch.allclose(weight, expected, atol=1e-5)


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.9), (7, 0.0), (25, 0.9)])
def test_the_total_step_with_momentum(steps, momentum):
    place = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0
        place += velocity
    assert scaffold.total_step(steps, momentum) == pytest.approx(place, rel=1e-12)


def test_the_servers_control_variate_changes_by_the_fraction_of_participants(setup):
    algorithm = call("scaffold")
    state = algorithm.initial_state(setup)
    ones = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    new = algorithm.aggregate(setup, state, {1: Update(ones, 9), 2: Update(ones, 1)}, seed=1)  # two of three
    assert all((tensor - 2 / 3).abs().max() < 1e-6 for tensor in tensors.take("control", new).values())


@pytest.mark.parametrize(("text", "expected"), [("scaffold", 0.5), ("scaffold:weighting=size", 0.9)])
def test_only_the_mean_of_the_weights_can_be_weighted_by_size(text, expected, setup):
    algorithm = call(text)
    state = algorithm.initial_state(setup)
    updates = {
        client: Update({name: torch.full_like(tensor, value) for name, tensor in state.items()}, size)
        for client, value, size in ((0, 1.0, 9), (2, 0.0, 1))
    }
    new = algorithm.aggregate(setup, state, updates, seed=1)
    assert all((tensor - expected).abs().max() < 1e-6 for tensor in tensors.take("student", new).values())
    assert all((tensor - 2 / 3 * 0.5).abs().max() < 1e-6 for tensor in tensors.take("control", new).values())


def test_models_drawn_around_the_clients_have_their_mean_and_variance():
    held = [{"w": torch.tensor([0.0, 5.0])}, {"w": torch.tensor([4.0, 5.0])}]
    drawn = torch.stack([m["w"] for m in fedbe.drawn_models(held, [1, 3], ["w"], 4000, "gaussian", seed=1)])
    assert torch.allclose(drawn.mean(0), torch.tensor([3.0, 5.0]), atol=0.1)  # 1/4 * 0 + 3/4 * 4
    assert torch.allclose(drawn.std(0), torch.tensor([math.sqrt(3.0), 0.0]), atol=0.1)
    mixed = torch.stack([m["w"] for m in fedbe.drawn_models(held, [1, 3], ["w"], 4000, "dirichlet", seed=1)])
    assert mixed[:, 0].min() >= 0
    assert mixed[:, 0].max() <= 4
    assert mixed[:, 0].mean().item() == pytest.approx(2.0, abs=0.1)
    assert (mixed[:, 1] == 5).all()


def test_fed_ets_targets_are_the_consensus_and_the_clients_that_disagree():
    setup = prepare(tiny(model="cnn:width=8", student="cnn:width=16")).setup
    updates = {
        k: Update(w, 1)
        for k, w in enumerate(
            [
                {
                    n: w + 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(k))
                    for n, w in setup.trainer.initial_weights("cnn:width=8").items()
                }
                for k in range(3)
            ]
        )
    }
    rows = torch.arange(9)
    answers = torch.stack(
        [setup.trainer.predict("cnn:width=8", u.tensors, setup.proxy.images[rows]) for u in updates.values()]
    )
    targets = call("fed-et:diversity=0.5").targets(setup, updates, answers, rows, seed=0)
    logits = list(answers.double().numpy())
    for sample in range(9):
        spread = [row[sample].var() for row in logits]
        mean = sum(v * row[sample] for v, row in zip(spread, logits, strict=True)) / sum(spread)
        expected = np.eye(10)[mean.argmax()]
        apart = [np.exp(r[sample]) / np.exp(r[sample]).sum() for r in logits if r[sample].argmax() != mean.argmax()]
        if apart:
            expected = expected + 0.5 * sum(apart) / len(apart)
        assert targets[sample].numpy() == pytest.approx(expected, abs=1e-5)


# -- methods that upload soft labels -----------------------------------------------------------------------------


def answers(setup, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, *setup.logits_shape, generator=generator)
    return {k: Update({"probs": value.softmax(-1)}, 10 + k) for k, value in enumerate(logits)}


def test_a_cfd_client_starts_anew_so_that_an_absent_one_misses_nothing(experiment):
    algorithm, setup = call("cfd"), experiment.setup
    request = {"round": torch.tensor(3), "prev": torch.tensor(2), "probs": answers(setup)[0].tensors["probs"]}
    old = tensors.put("model", {n: w + 1 for n, w in setup.trainer.initial_weights(setup.student).items()})
    results = [
        algorithm.local_update(setup, experiment.client(0, 3, memory), request)[0].tensors for memory in ({}, old)
    ]
    assert tensors.equal(*results)


def test_cfd_broadcasts_the_students_soft_labels(setup):
    algorithm = call("cfd")
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), answers(setup), seed=1)
    student = setup.trainer.predict(setup.student, algorithm.global_model(setup, state), setup.proxy.images)
    assert torch.allclose(algorithm.broadcast(setup, state, 0)["probs"], student.softmax(-1), atol=1e-6)


def test_cfd_sets_the_codecs():
    channel = prepare(tiny(algorithm="cfd:uplink_bits=1,downlink_bits=32", uplink_codec="float16")).channel
    assert (channel.uplink.bits, channel.uplink.coder, channel.uplink.delta) == (1, "range", True)
    assert type(channel.downlink).__name__ == "Float32"
    for wrong, expected in (
        ("cfd:uplink_bits=9", "uplink-bits and downlink-bits are 1 to 8, or 32"),
        ("cfd:downlink=student", "labels"),
    ):
        with pytest.raises(UsageError, match=expected):
            call(wrong)


def test_an_ema_of_the_student(setup):
    slow, fast = call("fedema:decay=0.75"), call("fedema:decay=0.0")
    updates = {k: Update({"logits": u.tensors["probs"].log()}, 1) for k, u in answers(setup).items()}
    start = setup.trainer.initial_weights(setup.student)
    ours, whole = (
        a.global_model(setup, a.aggregate(setup, a.initial_state(setup), updates, seed=1)) for a in (slow, fast)
    )
    assert all(torch.allclose(ours[n], 0.75 * start[n] + 0.25 * whole[n], atol=1e-6) for n in start)
    assert not torch.allclose(whole["0.0.weight"], start["0.0.weight"])


def test_fedgems_teacher_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    own, logits = torch.randn(60, 4, generator=generator), 2 * torch.randn(3, 60, 4, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    teacher = fedgems.selective_teacher(own, logits, functional.one_hot(labels, 4).float())
    kinds = set()
    for n in range(60):
        if own[n].argmax() == labels[n]:
            kind, expected = "server", own[n].softmax(-1).numpy()
        else:
            probs = [row[n].softmax(-1).double().numpy() for row in logits]
            right = [p for p in probs if p.argmax() == labels[n]]
            kind, expected = "label", np.eye(4)[labels[n]]
            if right:
                strength = np.array([math.exp(-1 / (p * np.log(p)).sum()) for p in right])
                kind, expected = "clients", (strength[:, None] * right).sum(0) / strength.sum()
        kinds.add(kind)
        assert teacher[n].numpy() == pytest.approx(expected, abs=1e-5)
    assert kinds == {"server", "label", "clients"}


def test_only_fedgems_reads_the_proxys_labels():
    assert prepare(tiny()).setup.proxy.labels is None
    experiment = prepare(tiny(algorithm="fedgems"))
    rows = torch.from_numpy(experiment.proxy_rows)
    assert torch.equal(experiment.setup.proxy.labels, experiment.train.labels[rows])


def test_kt_pfl_keeps_the_coefficients_of_an_absent_client(setup):
    algorithm = call("kt-pfl:penalty=0.1")
    updates = answers(setup)
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), {0: updates[0], 2: updates[2]}, seed=1)
    coefficients = state["coefficients"]
    assert torch.allclose(coefficients.sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(coefficients[1], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.allclose(coefficients[[0, 2], 1], torch.full((2,), 1 / 3, dtype=torch.float64))
    assert coefficients[0, 0] > coefficients[0, 2]  # it finds its own labels most like its own
    absent = algorithm.broadcast(setup, state, 1)["probs"]
    assert torch.allclose(absent, (updates[0].tensors["probs"] + updates[2].tensors["probs"]) / 2, atol=1e-6)


def test_a_comet_client_trains_towards_the_nearest_centroid(experiment):
    setup, client = experiment.setup, experiment.client(0, 2, {})
    own = setup.trainer.predict(client.model, setup.local_weights(client), setup.proxy.images).softmax(-1)
    near, far = (0.5 * own + 0.5 * other.tensors["probs"] for other in answers(setup, 2).values())
    far = 0.5 * far + 0.5 * answers(setup, 1, seed=4)[0].tensors["probs"]
    request = {"round": torch.tensor(2), "prev": torch.tensor(1), "0000/probs": far, "0001/probs": near}

    recorded, calls = recording(setup)
    call("comet:weight=2.0").local_update(recorded, client, request)
    (_, options), distance = calls[0], calls[0][1]["soft_objective"](torch.zeros(1, 10), torch.eye(10)[:1])
    soft_labels = options["soft_labels"]
    assert torch.equal(soft_labels.images, setup.proxy.images)
    assert torch.equal(soft_labels.targets, near)
    assert distance.item() == pytest.approx(2 * (0.9**2 + 9 * 0.1**2) ** 0.5)


def test_joint_training_is_the_mean_over_both_kinds_of_samples():
    """One batch that holds everything: a step of plain SGD along the gradient of the union's mean loss."""
    experiment = prepare(tiny(batch_size=4096, momentum=0.0, weight_decay=0.0, augment=False, model="cnn:width=8"))
    setup, client = experiment.setup, experiment.client(0, 1, {})
    rows, targets = torch.arange(0, 40, 2), answers(setup)[0].tensors["probs"][::2]
    start = setup.trainer.initial_weights(setup.student)

    def soft_objective(logits, probs):
        return 3 * (logits.softmax(-1) - probs).square().sum(-1).mean()

    soft_labels = SoftLabels(setup.proxy.images[rows], targets)
    ours = setup.trainer.train(client, start, soft_labels=soft_labels, soft_objective=soft_objective)
    module = models.build(setup.student, setup.classes, setup.config.norm)
    module.load_state_dict(start)
    private = functional.cross_entropy(
        module(setup.trainer.scaling(client.data.pixels)), client.data.labels, reduction="sum"
    )
    public = len(rows) * soft_objective(module(setup.trainer.scaling(setup.proxy.images[rows])), targets)
    ((private + public) / (len(client.data) + len(rows))).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(ours[name], parameter - setup.config.learning_rate * parameter.grad, atol=1e-5), name


def test_only_private_samples_are_augmented_in_joint_training(generator):
    images = torch.randint(256, (6, 16, 16, 3), dtype=torch.uint8, generator=generator)
    rows = torch.tensor([9, 1, 8, 2, 7, 0])
    seen = loop.Augmentation(crop=True, flip=True, first=5)(images, rows, generator)
    assert [torch.equal(a, b) for a, b in zip(images, seen, strict=True)] == [True, False, True, False, True, False]


# -- Selective-FD and density -------------------------------------------------------------------


def test_the_density_ratio_satisfies_its_own_optimality(generator):
    """The gradient of KuLSIF's objective in the RKHS is zero: the coefficient of each proxy point is -r / (m l)."""
    private, proxy = (
        torch.randn(40, 3, generator=generator).double(),
        2 * torch.randn(50, 3, generator=generator).double(),
    )
    at = torch.cat([private, proxy])
    unclipped = []
    clamp = torch.Tensor.clamp_min
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp_min", lambda t, low: unclipped.append(t) or clamp(t, low))
        density_ratio.ratio(private, proxy, at)
    r = unclipped[-1]
    width = torch.cdist(proxy, proxy, compute_mode=EXACT)[~torch.eye(50, dtype=bool)].median()
    penalty = 40**-0.9
    kernel = torch.exp(-0.5 * (torch.cdist(at, at, compute_mode=EXACT) / width) ** 2)
    coefficients = torch.cat([torch.full((40,), 1 / (40 * penalty), dtype=torch.float64), -r[40:] / (50 * penalty)])
    assert torch.allclose(kernel @ coefficients, r, atol=1e-8)


def test_the_density_ratio_of_two_normals(generator):
    private, proxy = (
        torch.randn(500, 1, generator=generator).double(),
        2 * torch.randn(500, 1, generator=generator).double(),
    )
    at = torch.linspace(-4, 4, 17).double()[:, None]
    truth = 2 * torch.exp(-0.5 * at[:, 0] ** 2 + 0.5 * (at[:, 0] / 2) ** 2)
    found = density_ratio.ratio(private, proxy, at)
    assert torch.corrcoef(torch.stack([found, truth]))[0, 1] > 0.95
    assert found[8] > 1 > found[0]


def test_packed_bits_can_be_unpacked(generator):
    for count in (1, 8, 13):
        chosen = torch.rand(count, generator=generator) < 0.5
        assert torch.equal(selective_fd.unpacked_bits(selective_fd.packed_bits(chosen), count), chosen)


def test_selective_fd_uses_only_uploaded_labels_and_keeps_certain_ones(setup):
    algorithm = call("selective-fd:server_threshold=1.0")
    sure, torn = torch.eye(10)[3] * 0.9 + 0.01, torch.full((10,), 0.1)
    first = {"selected": torch.zeros(40, dtype=torch.bool), "probs": torch.stack([sure, torn])}
    first["selected"][[4, 7]] = True  # 4: one is sure; 7: torn
    second = {"selected": torch.zeros(40, dtype=torch.bool), "probs": torch.eye(10)[[5]]}
    second["selected"][9] = True
    updates = {
        k: Update({**u, "selected": selective_fd.packed_bits(u["selected"])}, 5) for k, u in enumerate((first, second))
    }
    assert all(algorithm.check_update(setup, update) == "" for update in updates.values())
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    assert selective_fd.unpacked_bits(state["kept"], 40).nonzero().flatten().tolist() == [4, 9]
    assert torch.allclose(state["probs"], torch.stack([sure, torch.eye(10)[5]]), atol=1e-6)


def test_selective_fd_with_nothing_selected_does_not_change_student_or_clients(experiment):
    algorithm, setup = call("selective-fd"), experiment.setup
    none = {"selected": selective_fd.packed_bits(torch.zeros(40, dtype=torch.bool)), "probs": torch.zeros(0, 10)}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), {0: Update(none, 5)}, seed=1)
    assert tensors.equal(algorithm.global_model(setup, state), setup.trainer.initial_weights(setup.student))
    algorithm.local_update(setup, experiment.client(0, 2, {}), algorithm.broadcast(setup, state, 0))


def test_a_client_that_uploads_probs_of_other_samples_is_refused(setup):
    answered = selective_fd.packed_bits(torch.arange(40) < 3)
    update = Update({"selected": answered, "probs": torch.full((2, 10), 0.1)}, 5)
    assert "probs of other samples" in call("selective-fd").check_update(setup, update)
    padded = torch.full((5,), 255, dtype=torch.uint8)
    setup = dataclasses.replace(setup, proxy=dataclasses.replace(setup.proxy, per_round=34))
    assert "probs of other samples" in call("selective-fd").check_update(
        setup, Update({"selected": padded, "probs": PROBS}, 5)
    )
    assert "probs of other samples" not in call("selective-fd").check_update(
        setup, Update({"selected": padded, "probs": PROBS[:34]}, 5)
    )


@pytest.mark.parametrize("weight", [-1.0, 300.0, 3e38])
def test_weights_that_no_density_ratio_has_are_refused(setup, weight):
    assert "no density ratio" in call("density").check_update(setup, Update({"weight": torch.full((40,), weight)}, 5))


def test_a_density_ratio_has_a_largest_value(generator):
    private, proxy = 1e-3 * torch.randn(500, 2, generator=generator).double(), 50 + torch.rand(500, 2).double()
    assert 100 < density_ratio.ratio(private, proxy, private).max() <= 500**0.9


@pytest.mark.parametrize("counts", [[3, 3, -1] + [0] * 7, [2**62] + [0] * 9, [1] * 10])
def test_counts_of_classes_that_do_not_add_up_are_refused(setup, counts):
    update = Update({"prototypes": torch.zeros(10, 4), "counts": torch.tensor(counts)}, 5)
    assert "add up" in call("fedproto").check_update(setup, update)


@pytest.mark.parametrize(
    "name",
    ["fedavgm", "scaffold", "feddf", *map(slow, ("fedbe", "fedema"))],
)
def test_running_statistics_stay_valid(name, tmp_path):
    """A variance with momentum, or drawn at random, would be negative and the student NaN."""
    rows = simulated(tmp_path, algorithm=name, norm="batch", partitioner="dirichlet:alpha=0.3", clients=5, rounds=4)
    assert all(math.isfinite(row["test_loss"]) for row in rows)


def test_feddf_leaves_out_a_model_with_infinite_logits(setup):
    algorithm = call("feddf")
    good, bad = weights_of(setup, 2)
    bad = {name: weight * 1e30 for name, weight in bad.items()}
    state = algorithm.initial_state(setup)
    both = algorithm.aggregate(setup, state, {0: Update(good, 5), 1: Update(bad, 5)}, seed=1)
    assert tensors.equal(both, algorithm.aggregate(setup, state, {0: Update(good, 5)}, seed=1))
    with pytest.raises(RunError, match="finite"):
        algorithm.aggregate(setup, state, {1: Update(bad, 5)}, seed=1)


def test_an_untrained_fedgems_server_is_not_a_teacher(setup):
    setup = prepare(tiny(algorithm="fedgems", distill_epochs=0)).setup
    algorithm, seen = call("fedgems"), []
    original = fedgems.selective_teacher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedgems, "selective_teacher", lambda own, *more: seen.append(own) or original(own, *more))
        updates = {k: Update({"logits": u.tensors["probs"].log()}, 5) for k, u in answers(setup).items()}
        algorithm.aggregate(setup, algorithm.aggregate(setup, algorithm.initial_state(setup), updates, 1), updates, 2)
    labels = setup.proxy.labels[setup.proxy.subset(1)]
    assert not (seen[0].argmax(-1) == labels).any()
    assert torch.equal(
        seen[1], setup.trainer.predict(setup.student, setup.trainer.initial_weights(setup.student), setup.proxy.images)
    )


def test_density_weights_select_the_clients_with_dense_data(setup):
    algorithm = call("density")
    probs = answers(setup, count=2)
    weight = torch.zeros(2, 40)
    weight[0, :20] = weight[1, 20:] = 0.7
    updates = {k: Update({"logits": u.tensors["probs"].log(), "weight": weight[k]}, 5) for k, u in probs.items()}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    expected = torch.cat([probs[0].tensors["probs"][:20], probs[1].tensors["probs"][20:]])
    assert torch.allclose(state["probs"], expected, atol=1e-6)


# -- SCARLET ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "participation"), [(0, 1.0), (15, 1.0), (15, 0.5)])
def test_scarlets_caches_on_server_and_clients_are_equal(samples, participation):
    config = tiny(
        algorithm="scarlet:duration=2",
        proxy_samples=samples,
        clients=4,
        participation=participation,
        rounds=9,
        validation=1300,
    )
    experiment = prepare(config)
    algorithm, setup = experiment.algorithm, experiment.setup
    state, memories, asked = algorithm.initial_state(setup), {}, []
    oracle = torch.zeros(40, dtype=torch.int64)  # the round each label was made in, kept by hand
    rng = np.random.default_rng(0)
    for number in range(1, 10):
        before = oracle.clone()
        rows = setup.proxy.subset(number)
        old = [int(i) for i in rows if oracle[i] == 0 or number - oracle[i] > 2]
        updates = {}
        for client in sorted(rng.choice(4, size=round(4 * participation), replace=False)):
            held = experiment.client(int(client), number, memories.get(client, {}))
            update, memories[client] = algorithm.local_update(
                setup, held, algorithm.broadcast(setup, state, int(client))
            )
            assert torch.equal(memories[client]["cached"], before)
            assert torch.equal(memories[client]["cache"], state["cache"])
            assert update.tensors["probs"].shape == (len(old), 10)
            updates[int(client)] = update
        state = algorithm.aggregate(setup, state, updates, seed=number)
        oracle[old] = number
        asked.append(len(old))
    assert torch.equal(scarlet.label_rounds(setup, 2, 9), oracle)
    assert sum(asked) < 9 * len(setup.proxy.subset(1))
    if samples == 0:
        assert asked == [40, 0, 0, 40, 0, 0, 40, 0, 0]  # a label of round r serves in r + 1 and r + 2


def test_scarlet_runs_with_a_client_that_lost_its_memory():
    experiment = prepare(tiny(algorithm="scarlet", proxy_samples=15))
    algorithm, setup = experiment.algorithm, experiment.setup
    state = algorithm.initial_state(setup)
    for number in (1, 2):
        updates = {
            0: algorithm.local_update(setup, experiment.client(0, number, {}), algorithm.broadcast(setup, state, 0))[0]
        }
        state = algorithm.aggregate(setup, state, updates, seed=number)
    update, memory = algorithm.local_update(setup, experiment.client(0, 3, {}), algorithm.broadcast(setup, state, 0))
    assert update.tensors["probs"].isfinite().all()
    assert (memory["cached"] > 0).sum() < (scarlet.label_rounds(setup, 2, 2) > 0).sum()


# -- without a proxy ----------------------------------------------------------------------------


def test_bytes_of_fd_are_those_of_the_paper():
    setup = prepare(tiny()).setup
    (shape,) = call("fd").upload_spec(setup, 0, 1).values()
    assert 16 * 2 * math.prod(shape) * 32 == 102_400  # bits: 16 iterations, up and down
    network = {"": torch.zeros(1_199_648)}  # the paper's, of so many parameters
    assert 16 * 2 * 8 * tensors.numel(network) * network[""].element_size() == 1_228_439_552  # what FedAvg takes


def test_fds_means_leave_out_the_receiver_and_labels_without_samples(experiment):
    algorithm, setup = call("fd"), experiment.setup
    generator = torch.Generator().manual_seed(2)
    tables = torch.rand(3, 10, 10, generator=generator)
    tables /= tables.sum(-1, keepdim=True)
    tables[0, 4] = tables[1, 4] = 0  # only client 2 has seen label 4, nobody label 5
    tables[:, 5] = 0
    updates = {k: Update({"means": table}, 5) for k, table in enumerate(tables)}
    state = algorithm.aggregate(setup, {}, updates, seed=0)
    for client in range(4):
        sent = algorithm.broadcast(setup, state, client)["means"]
        for label in range(10):
            rows = [tables[k, label] for k in range(3) if k != client and tables[k, label].sum() > 0]
            expected = sum(rows) / len(rows) if rows else torch.zeros(10)
            assert torch.allclose(sent[label], expected, atol=1e-6)


def test_fds_means_are_those_of_the_clients_outputs(experiment):
    setup, client = experiment.setup, experiment.client(1, 1, {})
    update, memory = call("fd").local_update(setup, client, {})
    probs = setup.trainer.predict(client.model, tensors.take("model", memory), client.data.pixels).softmax(-1)
    for label in range(10):
        rows = [p for p, y in zip(probs, client.data.labels, strict=True) if y == label]
        expected = sum(rows) / len(rows) if rows else torch.zeros(10)
        assert torch.allclose(update.tensors["means"][label], expected, atol=1e-5)


def test_prototypes_are_class_means_weighted_by_counts(experiment):
    algorithm, setup = call("fedproto"), experiment.setup
    state = algorithm.initial_state(setup)
    updates = {k: algorithm.local_update(setup, experiment.client(k, 1, {}), state)[0] for k in range(3)}
    new = algorithm.aggregate(setup, state, updates, seed=0)
    for label in range(10):
        counts = [int(u.tensors["counts"][label]) for u in updates.values()]
        vectors = [u.tensors["prototypes"][label] for u in updates.values()]
        expected = sum(n * v for n, v in zip(counts, vectors, strict=True)) / sum(counts)
        assert torch.allclose(new["prototypes"][label], expected, atol=1e-4)
    missing = {**updates[0].tensors, "counts": torch.zeros(10, dtype=torch.int64)}
    assert tensors.equal(algorithm.aggregate(setup, new, {0: Update(missing, 5)}, seed=0), new)


def test_fedproto_reduces_the_distance_to_the_prototypes(experiment):
    setup, client = experiment.setup, experiment.client(0, 2, {})
    width = call("fedproto").initial_state(setup)["prototypes"].shape[1]
    request = {"prototypes": torch.zeros(10, width), "counts": torch.ones(10, dtype=torch.int64)}
    norms = []
    for pull in (0.0, 30.0):
        _, memory = call(f"fedproto:weight={pull}").local_update(setup, client, request)
        norms.append(setup.trainer.embed(client.model, tensors.take("model", memory), client.data.pixels).norm())
    assert norms[1] < 0.7 * norms[0]


def test_the_embedding_is_what_the_last_layer_sees(setup):
    weights = setup.trainer.initial_weights(setup.student)
    embedding = setup.trainer.embed(setup.student, weights, setup.proxy.images[:5])
    head = [name for name in weights if name.endswith(".weight")][-1].removesuffix(".weight")
    logits = embedding @ weights[f"{head}.weight"].T + weights[f"{head}.bias"]
    assert torch.allclose(logits, setup.trainer.predict(setup.student, weights, setup.proxy.images[:5]), atol=1e-5)


# -- NFDP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "replacement", "epsilon", "delta"),
    [(100, True, 0.03999, 0.0392), (100, False, 0.0408, 0.04), (500, True, 0.200, 0.181), (500, False, 0.223, 0.2)],
)
def test_published_epsilon_and_delta(samples, replacement, epsilon, delta):
    found = fedmd.sampling_privacy(2500, samples, replacement)
    assert found == pytest.approx((epsilon, delta), abs=6e-4 if samples == 500 else 6e-5)


def test_delta_without_replacement_is_the_chance_of_being_drawn():
    assert fedmd.sampling_privacy(7, 7, False)[1] == 1.0
    assert fedmd.sampling_privacy(2500, 100, False) == pytest.approx((math.log(2501 / 2401), 0.04), abs=1e-12)


def test_nfdp_trains_on_the_same_few_rows_in_every_round(experiment):
    algorithm, (setup, calls) = call("nfdp:samples=17"), recording(experiment.setup)
    for number in (1, 2):
        client = experiment.client(0, number, {})
        update, _ = algorithm.local_update(setup, client, {"round": torch.tensor(number)})
    seen = [client.data for client, _ in calls]
    assert len(seen[0]) == 17
    assert torch.equal(seen[0].pixels, seen[1].pixels)
    assert update.metrics["delta"] == pytest.approx(17 / len(experiment.client(0, 1, {}).data))


def test_feddistill_plus_is_fedavg_and_fd_at_once():
    """Its start and its mean of weights are FedAvg's, its objective and its table FD's."""
    experiment = prepare(tiny(partitioner="dirichlet:alpha=0.3"))
    setup, both, fd, average = experiment.setup, *map(call, ("feddistill-plus:gamma=0.5", "fd:gamma=0.5", "fedavg"))
    state = both.initial_state(setup)
    clients = [experiment.client(k, 1, {}) for k in range(3)]
    for number in (1, 2):
        updates = {}
        for client in clients:
            message = both.broadcast(setup, state, client.id)
            update, memory = both.local_update(setup, client, message)
            updates[client.id] = update
            assert shapes(update.tensors) == both.upload_spec(setup, client.id, number)
            # FD of a client whose own model is the global one.
            own = dataclasses.replace(client, memory=tensors.put("model", take("student", message)))
            table = {"means": message["means"]} if "means" in message else {}
            assert ("means" in message) == (number > 1)
            alone, kept = fd.local_update(setup, own, table)
            assert equal(memory, kept)
            assert equal(take("student", update.tensors), take("model", kept))
            assert equal({"means": update.tensors["means"]}, alone.tensors)
        state = both.aggregate(setup, state, updates, seed=number)
        weights = {k: Update(take("student", u.tensors), u.examples) for k, u in updates.items()}
        assert equal(both.global_model(setup, state), average.aggregate(setup, {}, weights, seed=number))
        tables = {k: Update({"means": u.tensors["means"]}, u.examples) for k, u in updates.items()}
        expected = fd.aggregate(setup, {}, tables, seed=number)
        assert equal({name: state[name] for name in expected}, expected)
