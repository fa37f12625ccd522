"""What single methods do in a round, written out: whose labels, which samples, which weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from fedkd.algorithms import aggregators, density_ratio, scarlet, selective_fd
from fedkd.algorithms import density as density_method
from fedkd.algorithms.base import Update
from fedkd.algorithms.fedgems import selective_teacher
from fedkd.core import seeds, specs, tensors
from fedkd.core.soft_labels import SoftLabels
from fedkd.core.tensors import equal, put, take
from fedkd.simulate.experiment import prepare
from fedkd.training import loop, models
from tests.conftest import tiny

ALL = "selective-fd:client_threshold=0,server_threshold=2"  # which leaves out almost nothing
OWN = ["dsfl", "dsfl:aggregation=sa", "dsfl:downlink=student", "cfd", "scarlet", ALL, "cronus", "fedgems"]
FIXED = ["feddf", "fedbe:samples=1", "fed-et", "fedmd", "comet", "fd", "fedproto"]
ONE_STEP = {"clients": 12, "batch_size": 4096, "momentum": 0.0, "weight_decay": 0.0, "augment": False}


def call(name):
    return specs.call("algorithm", name)


def labels_of(setup, count, seed=0, scale=3.0):
    """Soft labels [count, P, C] on the proxy images of one round."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, *setup.logits_shape, generator=generator)).softmax(-1)


def shifted(weights, scale, seed=0):
    """These weights with noise."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def module_of(setup, weights):
    module = models.build(setup.student, setup.classes, setup.config.norm)
    module.load_state_dict(dict(weights))
    return module.train()


def turn(experiment, number, state, memories, clients=(0, 1)):
    """One round of two clients: their updates, their memories, and the new state."""
    setup, algorithm = experiment.setup, experiment.algorithm
    updates, new = {}, dict(memories)
    for client in clients:
        held = experiment.client(client, number, memories.get(client, {}))
        updates[client], new[client] = algorithm.local_update(setup, held, algorithm.broadcast(setup, state, client))
    return updates, new, algorithm.aggregate(setup, state, updates, seed=number)


@pytest.fixture
def watched(monkeypatch):
    """The images and targets of every training, and the images of every prediction, as they come."""
    trained, predicted = [], []
    train, predict = loop.train, loop.predict

    def watching_descend(model, step, pixels, targets, *arguments, **options):
        trained.append((pixels, targets))
        train(model, step, pixels, targets, *arguments, **options)

    def watching_predict(model, pixels, *arguments):
        predicted.append(pixels)
        return predict(model, pixels, *arguments)

    monkeypatch.setattr(loop, "train", watching_descend)
    monkeypatch.setattr(loop, "predict", watching_predict)
    return trained, predicted


# -- methods with a teacher and a loss of their own ---------------------------------------------


def two_rounds(name, **run):
    experiment = prepare(tiny(algorithm=name, clients=12, **run))
    setup, algorithm = experiment.setup, experiment.algorithm
    first = turn(experiment, 1, algorithm.initial_state(setup), {})
    second = turn(experiment, 2, first[2], first[1])
    logits = 4 * torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1))
    teacher = algorithm.teacher_probs(setup, list(logits), torch.tensor([[1.0], [2.0], [3.0]]))
    return second[1][0], second[2], teacher


@pytest.mark.parametrize("name", [*OWN, *FIXED])
def test_a_method_with_its_own_loss_ignores_that_of_the_run(name):
    """Also the run's temperature and aggregator: in client training, server update and evaluation."""
    plain = two_rounds(name, temperature=1.0, loss="kl", aggregator="mean-probs")
    other = two_rounds(name, temperature=4.0, loss="dkd", aggregator="vote")
    assert equal(plain[0], other[0])
    assert equal(plain[1], other[1])
    if name in ("comet", "fd", "fedproto"):  # which have no teacher for all
        return
    assert torch.equal(plain[2], other[2])


@pytest.mark.parametrize("change", [{"temperature": 4.0}, {"loss": "dkd"}, {"aggregator": "vote"}])
def test_an_ensemble_does_not_ignore_them(change):
    """So that the test above can fail."""
    plain, other = two_rounds("ensemble:downlink=labels"), two_rounds("ensemble:downlink=labels", **change)
    assert not equal(plain[0], other[0])
    assert not equal(plain[1], other[1])
    assert torch.equal(plain[2], other[2]) is ("loss" in change)


@pytest.mark.parametrize("name", OWN)
def test_the_teacher_of_a_method_against_its_formula(name):
    setup, algorithm = prepare(tiny(temperature=4.0, aggregator="vote", loss="dkd")).setup, call(name)
    logits = 4 * torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1))
    mean = (torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) / 6 * logits.softmax(-1)).sum(0)
    if name.split(":")[0] == "dsfl" and "sa" not in name:
        mean = (mean / 0.1).softmax(-1)
    if name == "scarlet":
        mean = mean.square() / mean.square().sum(-1, keepdim=True)
    weights = torch.tensor([[1.0], [2.0], [3.0]])
    assert torch.allclose(algorithm.teacher_probs(setup, list(logits), weights), mean, atol=1e-6)


@pytest.mark.parametrize(("sharpen", "power"), [(0.5, 2), (0.25, 4)])
def test_the_teacher_of_fedbe_is_the_sharpened_mean_of_all_members(sharpen, power):
    setup = prepare(tiny(weighting="size")).setup
    logits = 4 * torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1))
    ours = call(f"fedbe:sharpen={sharpen}").teacher_probs(setup, list(logits), torch.tensor([[1.0], [2.0], [3.0]]))
    mean = logits.softmax(-1).mean(0) ** power
    assert torch.allclose(ours, mean / mean.sum(-1, keepdim=True), atol=1e-6)


# -- which samples of the proxy -----------------------------------------------------------------

WITH_STUDENT = ["ensemble:downlink=labels", "density:downlink=labels", "dsfl", "cfd", "cronus", ALL, "fedgems"]


@pytest.mark.parametrize("samples", [0, 15])
@pytest.mark.parametrize("name", [*WITH_STUDENT, "fedmd", "nfdp", "kt-pfl", "comet"])
def test_clients_of_a_round_have_the_same_tensors_of_proxy_images(name, samples, watched):
    """So that they are on a GPU once."""
    experiment = prepare(tiny(algorithm=name, proxy_samples=samples))
    setup, algorithm = experiment.setup, experiment.algorithm
    _, memories, state = turn(experiment, 1, algorithm.initial_state(setup), {})
    used = []
    for client in (0, 1):
        trained, predicted = (calls.clear() or calls for calls in watched)
        held = experiment.client(client, 2, memories[client])
        algorithm.local_update(setup, held, algorithm.broadcast(setup, state, client))
        used.append([*predicted, *(() if name in ("comet", "cronus") else (trained[0][0],))])
    assert [id(images) for images in used[0]] == [id(images) for images in used[1]]
    if not samples:
        assert all(images is setup.proxy.images for images in used[0])


@pytest.mark.parametrize("name", [*WITH_STUDENT, "fedmd", "nfdp", "kt-pfl", "comet"])
def test_clients_distill_the_samples_of_the_last_round_and_send_those_of_this_one(name, watched):
    experiment = prepare(tiny(algorithm=name, clients=12, proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    _, memories, state = turn(experiment, 1, algorithm.initial_state(setup), {})
    before, now = setup.proxy.subset(1), setup.proxy.subset(2)
    assert not torch.equal(before, now)
    request = algorithm.broadcast(setup, state, 0)
    trained, predicted = (calls.clear() or calls for calls in watched)
    update, _ = algorithm.local_update(setup, experiment.client(0, 2, memories[0]), request)
    kept = before[selective_fd.unpacked_bits(request["kept"], 15)] if name == ALL else before
    sent = now[selective_fd.unpacked_bits(update.tensors["selected"], 15)] if name == ALL else now
    assert len(kept) > 10
    assert torch.equal(trained[0][0][-len(kept) :], setup.proxy.images[kept])
    assert torch.equal(predicted[-1], setup.proxy.images[sent])
    if name == "comet":
        assert torch.equal(predicted[0], setup.proxy.images[before])
    if name not in ("fedgems", "comet", "cronus"):
        targets = request["logits"] if name in ("fedmd", "nfdp") else request["probs"]
        assert torch.equal(trained[0][1], targets)
    if name not in WITH_STUDENT:
        return
    trained.clear()
    new = algorithm.aggregate(setup, state, {0: update}, seed=2)
    kept = now[selective_fd.unpacked_bits(new["kept"], 15)] if name == ALL else now
    assert [torch.equal(pixels, setup.proxy.images[kept]) for pixels, _ in trained] == [True]
    assert (int(new["round"]), int(new["prev"])) == (3, 2)
    if name in ("cfd", "fedgems"):  # whose soft labels are the student's
        answer = setup.trainer.predict(setup.student, algorithm.global_model(setup, new), setup.proxy.images[now])
        assert torch.allclose(new["probs"], answer.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", ["feddf", "fedbe:samples=2", "fed-et"])
def test_a_server_of_weights_distills_the_samples_of_its_round(name, watched):
    experiment = prepare(tiny(algorithm=name, proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    state = {**algorithm.initial_state(setup), "round": torch.tensor(3)}
    updates = {k: Update(shifted(setup.trainer.initial_weights(setup.student), 0.05, k), 5 + k) for k in range(2)}
    trained, predicted = (calls.clear() or calls for calls in watched)
    new = algorithm.aggregate(setup, state, updates, seed=3)
    assert all(torch.equal(pixels, setup.proxy.images[setup.proxy.subset(3)]) for pixels in predicted)
    assert [torch.equal(pixels, setup.proxy.images[setup.proxy.subset(3)]) for pixels, _ in trained] == [True]
    assert len(predicted) == (2 + 1 + 2 if name.startswith("fedbe") else 2)
    assert int(new["round"]) == 4


def test_fed_et_averages_its_groups_and_distills_only_its_student():
    """Even where the student has a client's architecture; FedDF distills every group."""
    setup = prepare(tiny()).setup
    updates = {k: Update(shifted(setup.trainer.initial_weights(setup.student), 0.05, k), 5 + 10 * k) for k in range(2)}
    mean = tensors.weighted_mean([u.tensors for u in updates.values()], [5, 15])
    separate, together = call("fed-et"), call("feddf")
    new = separate.aggregate(setup, separate.initial_state(setup), updates, seed=1)
    assert equal(take("group0", new), mean)
    assert equal(separate.global_model(setup, new), take("student", new))
    assert not equal(take("student", new), setup.trainer.initial_weights(setup.student))
    assert not equal(take("group0", together.aggregate(setup, together.initial_state(setup), updates, seed=1)), mean)
    assert not take("student", together.initial_state(setup))


# -- FedGEMS ------------------------------------------------------------------------------------


def test_a_fedgems_client_uses_the_labels_of_the_samples_it_was_sent(watched):
    """Those of the round ``prev``, which may be earlier than the last one."""
    experiment = prepare(tiny(algorithm="fedgems:hard=0.6", proxy_samples=15, clients=12))
    setup, algorithm = experiment.setup, experiment.algorithm
    (probs,) = labels_of(setup, 1)
    rounds = {number: setup.proxy.labels[setup.proxy.subset(number)] for number in (1, 2, 3)}
    assert len({tuple(labels.tolist()) for labels in rounds.values()}) == 3
    trained = watched[0]
    algorithm.local_update(
        setup, experiment.client(0, 3, {}), {"round": torch.tensor(3), "prev": torch.tensor(1), "probs": probs}
    )
    pixels, targets = trained[0]
    assert torch.equal(pixels, setup.proxy.images[setup.proxy.subset(1)])
    assert torch.allclose(targets, 0.6 * F.one_hot(rounds[1], 10) + 0.4 * probs, atol=1e-6)
    assert torch.equal(trained[1][1], experiment.client(0, 3, {}).data.labels)


def test_the_fedgems_server_uses_the_labels_of_its_rounds_samples(watched):
    experiment = prepare(tiny(algorithm="fedgems:hard=0.6", proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    # Right about most of the proxy, since it was trained on it.
    everything = F.one_hot(setup.proxy.labels, 10).float()
    labels, initial = SoftLabels(setup.proxy.images, everything), setup.trainer.initial_weights(setup.student)
    student = setup.trainer.distill(setup.student, initial, labels, setup.distillation.objective, epochs=9, seed=1)
    rows = setup.proxy.subset(4)
    truth = everything[rows]
    logits = 2 * labels_of(setup, 3).log() + 9 * truth * (torch.arange(15) % 3 > 0)[:, None]
    updates = {k: Update({"logits": row}, 5) for k, row in enumerate(logits)}
    state = {
        **algorithm.initial_state(setup),
        "round": torch.tensor(4),
        "prev": torch.tensor(3),
        **put("student", student),
    }
    own = setup.trainer.predict(setup.student, student, setup.proxy.images[rows])
    is_right = own.argmax(-1) == setup.proxy.labels[rows]
    assert 0 < is_right.sum() < 15
    trained, predicted = (calls.clear() or calls for calls in watched)
    new = algorithm.aggregate(setup, state, updates, seed=7)
    (pixels, targets), *more = trained
    assert not more
    assert torch.equal(pixels, setup.proxy.images[rows])
    assert torch.allclose(targets, 0.6 * truth + 0.4 * selective_teacher(own, logits, truth), atol=1e-6)
    assert torch.allclose(targets[is_right], 0.6 * truth[is_right] + 0.4 * own[is_right].softmax(-1), atol=1e-5)
    assert all(torch.equal(images, setup.proxy.images[rows]) for images in predicted)
    answer = setup.trainer.predict(setup.student, algorithm.global_model(setup, new), setup.proxy.images[rows])
    assert torch.allclose(new["probs"], answer.softmax(-1), atol=1e-6)
    assert not torch.allclose(answer, own, atol=1e-3)


# -- SCAFFOLD and FedAvgM -----------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("batch", "steps"), [(50, 3), (4096, 1)])
def test_a_control_variate_with_a_partial_last_batch(momentum, nesterov, batch, steps):
    """The mean of the client's gradients over all steps, each weighted by how far it moved the model."""
    options = {"learning_rate": 0.04, "momentum": momentum, "weight_decay": 0.0, "augment": False}
    options |= {"optimizer": f"sgd:nesterov={nesterov}", "schedule": "step:milestones=2,gamma=0.5", "rounds": 3}
    experiment = prepare(tiny(algorithm="scaffold", clients=12, batch_size=batch, local_epochs=2, **options))
    setup, algorithm = experiment.setup, experiment.algorithm
    shape = setup.trainer.parameter_zeros(setup.student)
    own, common = shifted(shape, 0.01, 1), shifted(shape, 0.01, 2)
    client, start = experiment.client(1, 3, put("control", own)), setup.trainer.initial_weights(setup.student)
    update, memory = algorithm.local_update(setup, client, {**put("student", start), **put("control", common)})

    count = len(client.data)
    assert math.ceil(count / batch) == steps
    assert count % batch
    module, gradients = module_of(setup, start), []
    sgd = torch.optim.SGD(module.parameters(), lr=0.02, momentum=momentum, nesterov=nesterov)
    generator = torch.Generator().manual_seed(seeds.derive(client.seed, "fit"))
    for _ in range(2):
        order = torch.randperm(count, generator=generator)
        for first in range(0, count, batch):
            rows = order[first : first + batch]
            sgd.zero_grad()
            F.cross_entropy(
                module(setup.trainer.scaling(client.data.pixels[rows])), client.data.labels[rows]
            ).backward()
            gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
            for name, parameter in module.named_parameters():
                parameter.grad += common[name] - own[name]
            sgd.step()
    weights = [sum(momentum**later for later in range(2 * steps - step + nesterov)) for step in range(2 * steps)]
    for name, parameter in module.named_parameters():
        expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) / sum(weights)
        assert torch.allclose(take("control", memory)[name], expected, atol=1e-4), name
        assert torch.allclose(take("control", update.tensors)[name], expected - own[name], atol=1e-4), name
        assert torch.allclose(take("student", update.tensors)[name], parameter, atol=1e-5), name
    assert equal(take("model", memory), take("student", update.tensors))


def test_the_scaffold_server_takes_plain_means_and_adds_the_share_of_the_changes():
    setup, algorithm = prepare(tiny(clients=5)).setup, call("scaffold")
    state = shifted(algorithm.initial_state(setup), 0.1)
    first, second = shifted(state, 0.1, 1), shifted(state, 0.1, 2)
    new = algorithm.aggregate(setup, state, {0: Update(first, 10), 3: Update(second, 90)}, seed=1)
    for name in state:
        mean = (first[name] + second[name]) / 2
        expected = mean if name.startswith("student/") else state[name] + 2 / 5 * mean
        assert torch.allclose(new[name], expected, atol=1e-6), name


def test_fedavgm_has_no_velocity_for_buffers():
    """Parameters follow v = beta v + (w - mean); running statistics are the weighted mean of the clients'."""
    setup, algorithm = prepare(tiny(norm="batch")).setup, call("fedavgm:beta=0.5")
    start, state = setup.trainer.initial_weights(setup.student), algorithm.initial_state(setup)
    parameters = setup.trainer.parameter_zeros(setup.student)
    assert len(parameters) < len(start)

    def clients(seed):
        noisy = (shifted({n: w.double() for n, w in start.items()}, 0.1, seed + k) for k in range(2))
        return [{n: w.abs().to(start[n].dtype) for n, w in one.items()} for one in noisy]

    velocity, weights = dict.fromkeys(parameters, 0.0), start
    for number in (1, 2, 3):
        held = clients(10 * number)
        state = algorithm.aggregate(setup, state, {0: Update(held[0], 1), 1: Update(held[1], 3)}, number)
        mean = {name: 0.25 * held[0][name] + 0.75 * held[1][name] for name in start}
        velocity = {name: 0.5 * velocity[name] + weights[name] - mean[name] for name in parameters}
        weights = {n: weights[n] - velocity[n] if n in parameters else m for n, m in mean.items()}
        ours = algorithm.global_model(setup, state)
        assert set(ours) == set(start)
        for name, tensor in weights.items():
            atol = 1 if name.endswith("num_batches_tracked") else 1e-5
            assert torch.allclose(ours[name].double(), tensor.double(), atol=atol), (number, name)


# -- FedProto and FD ----------------------------------------------------------------------------


def prototypes_for(setup, known, seed=0):
    """A request whose classes not ``known`` hold garbage."""
    width = call("fedproto").initial_state(setup)["prototypes"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(10, width, generator=torch.Generator().manual_seed(99))
    garbage = 50 * torch.randn(10, width, generator=generator)
    return {"prototypes": torch.where(known[:, None] > 0, vectors, garbage), "counts": known}


COUNTS = torch.tensor([0, 3, 0, 1, 1, 0, 9, 1, 1, 1])


def test_a_prototype_without_samples_does_not_change_the_loss():
    experiment = prepare(tiny(algorithm="fedproto:weight=3", clients=12))
    setup, algorithm, client = experiment.setup, experiment.algorithm, experiment.client(0, 2, {})
    assert set(client.data.labels.tolist()) == set(range(10))
    some, other = (algorithm.local_update(setup, client, prototypes_for(setup, COUNTS, seed))[1] for seed in (0, 1))
    assert equal(some, other)
    nothing = torch.zeros_like(COUNTS)
    unpulled = algorithm.local_update(setup, client, prototypes_for(setup, nothing))[1]
    plain = setup.trainer.train(client, setup.local_weights(client))
    assert all(torch.allclose(take("model", unpulled)[name], plain[name], atol=1e-6) for name in plain)


def test_one_step_of_a_fedproto_client():
    """Cross-entropy plus the weighted mean distance; samples of classes without a prototype count as zero."""
    experiment = prepare(tiny(**ONE_STEP, algorithm="fedproto:weight=3"))
    setup, algorithm, client = experiment.setup, experiment.algorithm, experiment.client(0, 2, {})
    request, start = prototypes_for(setup, COUNTS), setup.trainer.initial_weights(setup.student)
    update, memory = algorithm.local_update(setup, client, request)
    module, labels = module_of(setup, start), client.data.labels
    embedding = module[:-1](setup.trainer.scaling(client.data.pixels))
    pulls = [
        ((vector - request["prototypes"][label]) ** 2).mean() if COUNTS[label] else torch.zeros(())
        for vector, label in zip(embedding, labels, strict=True)
    ]
    (F.cross_entropy(module[-1](embedding), labels) + 3 * sum(pulls) / len(labels)).backward()
    for name, parameter in module.named_parameters():
        expected = parameter - setup.config.learning_rate * parameter.grad
        assert torch.allclose(take("model", memory)[name], expected, atol=1e-5), name
    after = module_of(setup, take("model", memory)).eval()
    with torch.no_grad():
        vectors = after[:-1](setup.trainer.scaling(client.data.pixels))
    for label in range(10):
        assert int(update.tensors["counts"][label]) == int((labels == label).sum())
        assert torch.allclose(update.tensors["prototypes"][label], vectors[labels == label].mean(0), atol=1e-4)


def test_a_class_of_no_sample_does_not_move_the_servers_prototype():
    """Clients without it have no influence; if no client has it, prototype and count stay."""
    setup, algorithm = prepare(tiny()).setup, call("fedproto")
    state = prototypes_for(setup, torch.full((10,), 7))
    shape, generator = state["prototypes"].shape, torch.Generator().manual_seed(1)
    first, second = torch.randn(2, *shape, generator=generator)
    counts = torch.tensor([[5, 0, 2] + [1] * 7, [0, 0, 6] + [1] * 7])
    first[1], second[:2] = 100.0, 100.0
    updates = {
        k: Update({"prototypes": vectors, "counts": counts[k]}, int(counts[k].sum()))
        for k, vectors in enumerate((first, second))
    }
    new = algorithm.aggregate(setup, state, updates, seed=0)
    assert torch.allclose(new["prototypes"][0], first[0])
    assert torch.equal(new["prototypes"][1], state["prototypes"][1])
    assert torch.allclose(new["prototypes"][2], 0.25 * first[2] + 0.75 * second[2], atol=1e-6)
    assert torch.allclose(new["prototypes"][3:], (first[3:] + second[3:]) / 2, atol=1e-6)
    assert new["counts"].tolist() == [5, 7, 8, *[2] * 7]


def test_one_step_of_an_fd_client():
    """Cross-entropy with the label plus gamma times that with the others' mean for it; none where it is zeros."""
    experiment = prepare(tiny(**ONE_STEP, algorithm="fd:gamma=2"))
    setup, client = experiment.setup, experiment.client(0, 2, {})
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    table[[2, 5]] = 0
    _, memory = experiment.algorithm.local_update(setup, client, {"means": table})
    module, labels = module_of(setup, setup.trainer.initial_weights(setup.student)), client.data.labels
    log_probs = module(setup.trainer.scaling(client.data.pixels)).log_softmax(-1)
    losses = [-row[y] - 2 * (table[y] * row).sum() for row, y in zip(log_probs, labels, strict=True)]
    (sum(losses) / len(losses)).backward()
    for name, parameter in module.named_parameters():
        expected = parameter - setup.config.learning_rate * parameter.grad
        assert torch.allclose(take("model", memory)[name], expected, atol=1e-5), name


def test_fds_means_of_the_others_when_the_first_clients_were_absent():
    """A client is known by its number, not by its place; one that was absent gets the mean of all."""
    setup, algorithm = prepare(tiny(clients=6)).setup, call("fd")
    tables = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tables[0, 4] = tables[0, 5] = tables[2, 5] = tables[:, 7] = 0  # 5: client 3 alone has it; 7: nobody
    state = algorithm.aggregate(
        setup, {}, {k: Update({"means": t}, 5) for k, t in zip((1, 3, 4), tables, strict=True)}, 0
    )
    assert not algorithm.broadcast(setup, {}, 0)
    for client in range(6):
        sent = algorithm.broadcast(setup, state, client)["means"]
        others = [table for k, table in zip((1, 3, 4), tables, strict=True) if k != client]
        for label in range(10):
            rows = [table[label] for table in others if table[label].sum() > 0]
            expected = sum(rows) / len(rows) if rows else torch.zeros(10)
            assert torch.allclose(sent[label], expected, atol=1e-6), (client, label)


# -- KT-pFL and COMET ---------------------------------------------------------------------------


def test_kt_pfl_coefficients_over_two_rounds_with_other_clients():
    setup, algorithm = prepare(tiny()).setup, call("kt-pfl:penalty=0.1")
    labels = labels_of(setup, 4)
    first = algorithm.aggregate(
        setup, algorithm.initial_state(setup), {k: Update({"probs": labels[i]}, 5) for i, k in enumerate((0, 2))}, 1
    )
    second = algorithm.aggregate(
        setup, first, {k: Update({"probs": labels[2 + i]}, 5) for i, k in enumerate((1, 2))}, 2
    )
    before, after = first["coefficients"], second["coefficients"]
    mixing = aggregators.mixing(labels[2:], penalty=0.1)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[[1, 2], 0], before[[1, 2], 0])
    for row, client in enumerate((1, 2)):
        held = before[client, 1] + before[client, 2]
        assert torch.allclose(after[client, 1:], held * mixing[row], atol=1e-12)
    assert before[2, 2] != before[2, 1]
    for client in range(3):
        shares = after[client, 1:] / after[client, 1:].sum()
        asked = algorithm.broadcast(setup, second, client)
        expected = shares[0] * labels[2].double() + shares[1] * labels[3].double()
        assert torch.allclose(asked["probs"].double(), expected, atol=1e-6)
        assert (int(asked["round"]), int(asked["prev"])) == (3, 2)


def test_a_kt_pfl_client_with_zero_coefficients_for_all_participants_gets_their_mean():
    setup, algorithm = prepare(tiny()).setup, call("kt-pfl")
    labels = labels_of(setup, 2)
    state = algorithm.aggregate(
        setup,
        algorithm.initial_state(setup),
        {k: Update({"probs": p}, 5) for k, p in zip((1, 2), labels, strict=True)},
        1,
    )
    coefficients = state["coefficients"].clone()
    coefficients[0] = torch.tensor([1.0, 0.0, 0.0])
    asked = algorithm.broadcast(setup, {**state, "coefficients": coefficients}, 0)
    assert torch.allclose(asked["probs"], labels.mean(0), atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_comet_client_finds_its_centroid_by_the_model_it_remembers(watched, order):
    """On the samples the centroids are of, which are not those of this round."""
    experiment = prepare(tiny(algorithm="comet", clients=12, proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    weights = shifted(setup.trainer.initial_weights(setup.student), 0.3)

    def answers(held, number):
        return setup.trainer.predict(setup.student, held, setup.proxy.images[setup.proxy.subset(number)]).softmax(-1)

    own, fresh, later = (
        answers(weights, 1),
        answers(setup.trainer.initial_weights(setup.student), 1),
        answers(weights, 2),
    )
    for wrong in (fresh, later):
        near, far = 0.9 * own + 0.1 * wrong, 0.1 * own + 0.9 * wrong
        named = {f"{place:04d}/probs": (near, far)[which] for place, which in enumerate(order)}
        watched[0].clear()
        algorithm.local_update(
            setup,
            experiment.client(0, 2, put("model", weights)),
            {"round": torch.tensor(2), "prev": torch.tensor(1), **named},
        )
        pixels, targets = watched[0][0]
        assert torch.equal(pixels[-15:], setup.proxy.images[setup.proxy.subset(1)])
        assert torch.equal(targets[-15:, :-1], near)


def test_comets_server_keeps_a_centroid_of_each_cluster():
    setup, algorithm = prepare(tiny()).setup, call("comet:clusters=2")
    base = labels_of(setup, 2)
    labels = [0.95 * base[k % 2] + 0.05 * noise for k, noise in enumerate(labels_of(setup, 5, seed=1))]
    updates = {3 * k: Update({"probs": p}, 5 + k) for k, p in enumerate(labels)}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    assert set(state) == {"round", "prev", "0000/probs", "0001/probs"}
    assert torch.allclose(state["0000/probs"], torch.stack(labels[::2]).mean(0), atol=1e-6)
    assert torch.allclose(state["0001/probs"], torch.stack(labels[1::2]).mean(0), atol=1e-6)
    assert (int(state["round"]), int(state["prev"])) == (2, 1)


# -- density, Selective-FD and SCARLET ----------------------------------------------------------


@pytest.mark.parametrize("most", [500, 20])
def test_a_clients_weight_is_how_much_denser_it_lies_in_its_data_than_in_the_proxy(monkeypatch, most):
    """Where there are more images of either kind than are compared, they are drawn, apart from each other."""
    monkeypatch.setattr(density_method, "MAX_SAMPLES", most)
    experiment = prepare(tiny(algorithm="density", clients=12, proxy_samples=15))
    setup, client = experiment.setup, experiment.client(1, 2, {})
    update, _ = experiment.algorithm.local_update(setup, client, {"round": torch.tensor(2)})
    private, public = (
        density_ratio.features(setup.proxy.images, client.data.pixels),
        density_ratio.features(setup.proxy.images, setup.proxy.images),
    )
    at = public[setup.proxy.subset(2)]
    drawn = [
        points[torch.randperm(len(points), generator=seeds.generator(setup.config.seed, purpose, 1))[:most]]
        for points, purpose in ((private, "density, own"), (public, "density, proxy"))
    ]
    expected = density_ratio.ratio(*drawn, at)
    assert torch.allclose(update.tensors["weight"].double(), expected, atol=1e-5)
    assert torch.allclose(expected, density_ratio.ratio(private, public, at), atol=1e-5) is (most == 500)


def test_density_weights_multiply_votes_by_size():
    setup, algorithm = prepare(tiny(weighting="size")).setup, call("density")
    logits = labels_of(setup, 2).log()
    weights = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    updates = {k: Update({"logits": logits[k], "weight": weights[k]}, (2, 6)[k]) for k in range(2)}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    shares = torch.tensor([[2.0], [6.0]]) * weights
    shares = (shares / shares.sum(0))[..., None]
    assert torch.allclose(state["probs"], (shares * logits.softmax(-1)).sum(0), atol=1e-6)


def test_a_selective_client_sends_what_lies_above_its_threshold():
    """Not what lies on it."""
    experiment = prepare(tiny(algorithm="selective-fd", clients=12, proxy_samples=15))
    setup, client = experiment.setup, experiment.client(0, 2, {})
    rows = setup.proxy.subset(2)
    ratio = density_method.client_density_ratio(setup, client, rows)
    algorithm = dataclasses.replace(experiment.algorithm, client_threshold=ratio.median().item())
    update, memory = algorithm.local_update(setup, client, {"round": torch.tensor(2)})
    is_known = ratio > ratio.median()
    assert is_known.sum() < (ratio >= ratio.median()).sum() < 15
    assert torch.equal(selective_fd.unpacked_bits(update.tensors["selected"], 15), is_known)
    logits = setup.trainer.predict(client.model, take("model", memory), setup.proxy.images[rows[is_known]])
    assert torch.allclose(update.tensors["probs"], logits.softmax(-1), atol=1e-5)
    assert update.metrics["coverage"] == pytest.approx(int(is_known.sum()) / 15)


@pytest.mark.parametrize(("threshold", "expected"), [(1.0, [3, 7, 9]), (2.0, [3, 5, 7, 9])])
def test_a_selective_server_averages_the_uploaded_labels_and_keeps_those_below_its_threshold(
    watched, threshold, expected
):
    """Among the samples that a client selected; at p = 1/2 the distance is exactly 1.0."""
    setup = prepare(tiny(weighting="size", proxy_samples=15)).setup
    algorithm = call(f"selective-fd:server_threshold={threshold}")
    torn, sure = torch.eye(10)[[0, 1]].mean(0), 0.7 * torch.eye(10)[2] + 0.03
    first = torch.stack([torch.eye(10)[4], torn, sure])
    second = torch.stack([torch.eye(10)[5], sure])
    updates = {}
    for client, probs, places, size in ((0, first, [3, 5, 7], 10), (1, second, [3, 9], 30)):
        answered = torch.zeros(15, dtype=torch.bool)
        answered[places] = True
        updates[client] = Update({"probs": probs, "selected": selective_fd.packed_bits(answered)}, size)
    state = {**algorithm.initial_state(setup), "round": torch.tensor(2)}
    new = algorithm.aggregate(setup, state, updates, seed=1)
    assert selective_fd.unpacked_bits(new["kept"], 15).nonzero().flatten().tolist() == expected
    both = 0.25 * torch.eye(10)[4] + 0.75 * torch.eye(10)[5]
    probs = {3: both, 5: torn, 7: sure, 9: sure}
    assert torch.allclose(new["probs"], torch.stack([probs[place] for place in expected]), atol=1e-6)
    ((pixels, targets),) = watched[0]
    assert torch.equal(pixels, setup.proxy.images[setup.proxy.subset(2)[expected]])
    assert torch.equal(targets, new["probs"])


def test_a_selective_client_distills_what_the_server_kept(watched):
    experiment = prepare(tiny(algorithm="selective-fd", clients=12, proxy_samples=15))
    setup = experiment.setup
    (probs,) = labels_of(setup, 1)
    kept = torch.arange(15) % 4 == 1
    request = {
        "round": torch.tensor(3),
        "prev": torch.tensor(1),
        "kept": selective_fd.packed_bits(kept),
        "probs": probs[kept],
    }
    experiment.algorithm.local_update(setup, experiment.client(0, 3, {}), request)
    pixels, targets = watched[0][0]
    assert torch.equal(pixels, setup.proxy.images[setup.proxy.subset(1)[kept]])
    assert torch.equal(targets, probs[kept])


def test_scarlet_sends_the_labels_computed_since_the_clients_last_accepted_update():
    """All labels if its update was never accepted; else those since its last round, which is included."""
    experiment = prepare(tiny(algorithm="scarlet:duration=1", clients=12, proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    state, memories, present = algorithm.initial_state(setup), {}, {1: [0, 1], 2: [0], 3: [0]}
    for number, clients in present.items():
        _, memories, state = turn(experiment, number, state, memories, clients)
    assert state["seen"].tolist() == [3, 1, *[0] * 10]
    made = torch.zeros(40, dtype=torch.int64)
    for number in (1, 2, 3):
        rows = setup.proxy.subset(number)
        made[rows] = torch.where((made[rows] == 0) | (number - made[rows] > 1), number, made[rows])
    assert torch.equal(scarlet.label_rounds(setup, 1, 3), made)
    counts = []
    for client, since in ((0, 3), (1, 1), (2, 0)):
        request = algorithm.broadcast(setup, state, client)
        assert int(request["since"]) == since
        expected = state["cache"][(made >= since) & (made > 0)]
        assert torch.equal(request["probs"], expected)
        counts.append(len(expected))
    assert 0 < counts[0] < counts[1]


def test_a_scarlet_client_distills_the_samples_of_the_last_round_from_its_cache(watched):
    experiment = prepare(tiny(algorithm="scarlet:duration=5", clients=12, proxy_samples=15))
    setup, algorithm = experiment.setup, experiment.algorithm
    state, memories = algorithm.initial_state(setup), {}
    for number in (1, 2):
        _, memories, state = turn(experiment, number, state, memories)
    trained, predicted = (calls.clear() or calls for calls in watched)
    algorithm.local_update(setup, experiment.client(0, 3, memories[0]), algorithm.broadcast(setup, state, 0))
    rows, known = setup.proxy.subset(2), torch.cat([setup.proxy.subset(1), setup.proxy.subset(2)])
    assert torch.equal(trained[0][0], setup.proxy.images[rows])
    assert torch.equal(trained[0][1], state["cache"][rows])
    asked = setup.proxy.subset(3)
    asked = asked[~torch.isin(asked, known)]
    assert 0 < len(asked) < 15
    assert torch.equal(predicted[-1], setup.proxy.images[asked])


def test_the_scarlet_server_distills_its_cache_with_the_labels_of_this_round_in_it(watched):
    setup, algorithm = prepare(tiny(clients=4, proxy_samples=15)).setup, call("scarlet:duration=5")
    (first,), state = labels_of(setup, 1, seed=1), algorithm.initial_state(setup)
    state = algorithm.aggregate(setup, state, {2: Update({"probs": first}, 5)}, seed=1)
    asked = algorithm.requested(setup, 2)
    rows, held = setup.proxy.subset(2), ~torch.isin(setup.proxy.subset(2), asked)
    assert 0 < held.sum() < 15
    second = labels_of(setup, 2, seed=2)[:, : len(asked)]
    watched[0].clear()
    new = algorithm.aggregate(setup, state, {k: Update({"probs": p}, 5) for k, p in enumerate(second)}, seed=2)
    ((pixels, targets),) = watched[0]
    assert torch.equal(pixels, setup.proxy.images[rows])
    assert torch.equal(targets, new["cache"][rows])
    assert torch.equal(targets[held], state["cache"][rows[held]])
    mean = second.mean(0)
    expected = mean.square() / mean.square().sum(-1, keepdim=True)
    assert torch.allclose(targets[~held], expected, atol=1e-6)
    assert new["seen"].tolist() == [2, 2, 1, 0]
