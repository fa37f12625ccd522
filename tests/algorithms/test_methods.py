"""Properties of every registered algorithm, and of single ones."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import Distillation, Update
from fedkd.core import specs, tensors
from fedkd.core.catalog import CATALOG
from fedkd.core.communication.ledger import SerializedBytes, Traffic, is_soft_label
from fedkd.core.communication.replies import Failure, Reply
from fedkd.core.communication.validation import validate_update
from fedkd.core.errors import UsageError
from fedkd.core.soft_labels import SoftLabels
from fedkd.simulate import rounds
from fedkd.simulate.evaluation import metrics
from fedkd.simulate.experiment import prepare
from fedkd.simulate.rounds import Round
from fedkd.training import together
from fedkd.training.losses.logits import cross_entropy
from tests.conftest import MENTORS, QUICK, SELECTING, tiny

NAMES = sorted(CATALOG["algorithm"])
MORE = [
    *NAMES,
    "dsfl:aggregation=sa",
    "ensemble:downlink=labels",
    "ensemble:downlink=student",
    "fedprox:mu=0.1",
    "fedbe:posterior=dirichlet",
    "cfd:uplink_bits=32,downlink_bits=2",
    "cronus:downlink=nothing",
]
# One model for all.
SAME = {"fedavg", "fedprox", "fedavgm", "moon", "fedntd", "fedlmd", "fedvls", "feddistill-plus", *MENTORS}
SAME |= {"fedgen", "fedhkd", "scaffold", "fedbe", "fedema", "central"}
PERSONAL = {
    "fedmd",
    "fedgkt",
    "nfdp",
    "comet",
    "kt-pfl",
    "fd",
    "fedproto",
    "fedtgp",
    "local",
    "central",
}  # without a global student


def one_round(experiment, algorithm, number, state, memories, clients=None):
    """One round without communication; clients compute together if the local grid would let them."""
    setup = experiment.setup

    def local_update(client):
        held = experiment.client(client, number, memories.get(client, {}))
        return algorithm.local_update(setup, held, algorithm.broadcast(setup, state, client))

    sampled = range(experiment.clients) if clients is None else clients
    if together.pays(setup.trainer.device):
        results = list(together.run([partial(local_update, client) for client in sampled]))
    else:
        results = list(map(local_update, sampled))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    updates = {client: update for client, (update, _) in zip(sampled, results, strict=True)}
    new = {**memories, **{client: memory for client, (_, memory) in zip(sampled, results, strict=True)}}
    return updates, new, algorithm.aggregate(setup, state, updates, seed=number)


@pytest.fixture(scope="module", params=[*((n, False) for n in MORE), *((n, True) for n in MORE)], ids=str)
def two_rounds(request):
    """Two rounds of a method, with clients that compute one after the other or, on fewer samples, together."""
    name, is_together = request.param
    name = {**QUICK, **SELECTING}.get(name, name)
    changes = {"validation": 1300 if is_together else 1000}  # of 1,398 samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "pays", lambda _: is_together)
        experiment = prepare(tiny(algorithm=name, model="cnn:width=8", clients=3, **changes))
        algorithm, setup = experiment.algorithm, experiment.setup
        first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {})
        second = one_round(experiment, algorithm, 2, first[2], first[1])
        yield experiment, first, second


def test_repeating_a_round_gives_bitwise_equal_results(two_rounds):
    experiment, first, second = two_rounds
    torch.manual_seed(1234)  # the process-wide stream must not matter
    updates, memories, state = one_round(experiment, experiment.algorithm, 2, first[2], first[1])
    assert all(tensors.equal(updates[k].tensors, second[0][k].tensors) for k in updates)
    assert all(tensors.equal(memories[k], second[1][k]) for k in memories)
    assert tensors.equal(state, second[2])


def test_arguments_are_not_changed(two_rounds):
    experiment, first, second = two_rounds
    setup, algorithm = experiment.setup, experiment.algorithm
    state, memories, updates = copy.deepcopy((first[2], first[1], second[0]))
    request = algorithm.broadcast(setup, state, 0)
    asked = copy.deepcopy(request)
    algorithm.local_update(setup, experiment.client(0, 2, memories[0]), request)
    algorithm.aggregate(setup, state, updates, 2)
    algorithm.global_model(setup, state)
    assert tensors.equal(asked, request)
    assert tensors.equal(state, first[2])
    assert tensors.equal(memories[0], first[1][0])
    assert all(tensors.equal(updates[k].tensors, second[0][k].tensors) for k in updates)


def test_state_memory_and_messages_are_cpu_tensors_without_grad(two_rounds):
    experiment, _, (updates, memories, state) = two_rounds
    lasting = [
        state,
        *memories.values(),
        *(u.tensors for u in updates.values()),
        experiment.algorithm.broadcast(experiment.setup, state, 0),
    ]
    for mapping in lasting:
        for tensor in mapping.values():
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad
            assert not tensor.is_inference()


def test_updates_match_the_upload_spec(two_rounds):
    experiment, first, second = two_rounds
    algorithm, setup = experiment.algorithm, experiment.setup
    for number, updates in enumerate((first[0], second[0]), 1):
        for client, update in updates.items():
            shapes, samples = algorithm.upload_spec(setup, client, number), experiment.sizes[client]
            assert validate_update(update, shapes, algorithm.metrics, samples) == ""
            sizes = experiment.channel.upload_sizes(shapes)
            assert {name: tensor.nbytes <= sizes[name] for name, tensor in update.tensors.items()} == dict.fromkeys(
                sizes, True
            )
            assert algorithm.check_update(setup, update) == ""


def test_the_first_broadcast_has_no_soft_labels(two_rounds):
    """Else the labels of untrained models would be distilled."""
    experiment, _, _ = two_rounds
    algorithm, setup = experiment.algorithm, experiment.setup
    first = algorithm.broadcast(setup, algorithm.initial_state(setup), 0)
    assert not [name for name, tensor in first.items() if is_soft_label(name) and len(tensor)]


def test_the_broadcast_changes_the_local_update(two_rounds):
    """Else an exchange that does nothing would pass unnoticed."""
    experiment, first, second = two_rounds
    algorithm, setup = experiment.algorithm, experiment.setup
    asked = algorithm.broadcast(setup, first[2], 0)
    if set(asked) <= {"round"}:
        assert experiment.config.algorithm in ("local", "central", "ensemble", "density", "cronus:downlink=nothing")
        return
    cut = dict(algorithm.broadcast(setup, algorithm.initial_state(setup), 0))
    if "round" in cut:
        cut["round"] = torch.tensor(2)
    if "since" in cut:  # whose labels must be as many as are due
        cut = {**asked, "probs": torch.full_like(asked["probs"], 0.1)}
    _, memory = algorithm.local_update(setup, experiment.client(0, 2, first[1][0]), cut)
    assert not tensors.equal(*(tensors.take("model", held) for held in (memory, second[1][0])))


def test_a_client_may_be_absent(two_rounds):
    experiment, first, _ = two_rounds
    clients = [0] if experiment.clients == 1 else [0, 2]
    _, memories, state = one_round(experiment, experiment.algorithm, 2, first[2], first[1], clients)
    one_round(experiment, experiment.algorithm, 3, state, memories)


def test_a_client_may_join_late(two_rounds):
    experiment, first, _ = two_rounds
    memories = {client: memory for client, memory in first[1].items() if client != 0}
    one_round(experiment, experiment.algorithm, 2, first[2], memories)


def test_the_memory_holds_the_clients_model(two_rounds):
    experiment, _, (_, memories, _) = two_rounds
    weights = tensors.take("model", memories[0])
    assert experiment.setup.trainer.predict(
        experiment.setup.model_of(0), weights, experiment.test.pixels[:3]
    ).shape == (3, 10)


def test_the_global_model_is_a_student_or_empty(two_rounds):
    experiment, _, (_, _, state) = two_rounds
    weights = experiment.algorithm.global_model(experiment.setup, state)
    if weights:
        assert experiment.setup.trainer.predict(
            experiment.setup.student, weights, experiment.test.pixels[:3]
        ).shape == (3, 10)
    else:
        assert experiment.config.algorithm.partition(":")[0] in PERSONAL


@pytest.fixture(scope="module")
def setup():
    return prepare(tiny()).setup


def answers(count=3, seed=0, setup=None):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, *setup.logits_shape, generator=generator)
    return {k: Update({"logits": value}, 10 + k) for k, value in enumerate(logits)}


def test_an_ensemble_of_one_is_plain_distillation(setup):
    algorithm = specs.call("algorithm", "ensemble")
    (update,) = answers(1, setup=setup).values()
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), {0: update}, seed=5)
    student = setup.trainer.distill(
        setup.student,
        setup.trainer.initial_weights(setup.student),
        SoftLabels(setup.proxy.images[setup.proxy.subset(1)], update.tensors["logits"].softmax(-1)),
        setup.distillation.objective,
        epochs=setup.config.distill_epochs,
        seed=5,
    )
    ours = algorithm.global_model(setup, state)
    assert all(torch.allclose(ours[name], student[name], atol=1e-5) for name in student)


@pytest.mark.parametrize(
    ("downlink", "first", "later"),
    [("nothing", {"round"}, {"round"}), ("labels", {"round"}, {"round", "prev", "probs"}), ("student", "all", "all")],
)
def test_each_downlink_option_sends_its_tensors(setup, downlink, first, later):
    algorithm = specs.call("algorithm", f"ensemble:downlink={downlink}")
    student = {"round", *tensors.put("student", setup.trainer.initial_weights(setup.student))}
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), answers(setup=setup), seed=1)
    for held, wanted in ((algorithm.initial_state(setup), first), (state, later)):
        assert set(algorithm.broadcast(setup, held, 0)) == (student if wanted == "all" else wanted)
    assert algorithm.needs_one_model is (downlink == "student")


def test_a_client_that_is_sent_the_student_trains_from_it(experiment):
    algorithm, setup = specs.call("algorithm", "ensemble:downlink=student"), experiment.setup
    other = {name: weight * 0.5 for name, weight in setup.trainer.initial_weights(setup.student).items()}
    client = experiment.client(0, 2, tensors.put("model", setup.trainer.initial_weights(setup.student)))
    request = {"round": torch.tensor(2), **tensors.put("student", other)}
    _, memory = algorithm.local_update(setup, client, request)
    assert tensors.equal(tensors.take("model", memory), setup.trainer.train(client, other))


def test_dsfl_sends_probabilities_and_sharpens_their_mean(setup):
    algorithm = specs.call("algorithm", "dsfl:temperature=0.1")
    probs = {
        k: dataclasses.replace(u, tensors={"probs": u.tensors["logits"].softmax(-1)})
        for k, u in answers(setup=setup).items()
    }
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), probs, seed=1)
    mean = torch.stack([u.tensors["probs"].double() for u in probs.values()]).mean(0)
    assert torch.allclose(state["probs"].double(), (mean / 0.1).softmax(-1), atol=1e-5)
    plain = specs.call("algorithm", "dsfl:aggregation=sa").aggregate(
        setup, algorithm.initial_state(setup), probs, seed=1
    )
    assert torch.allclose(plain["probs"].double(), mean, atol=1e-6)


def test_dsfl_ignores_the_runs_loss_aggregator_and_temperature(setup):
    ignored = Distillation(aggregators.mean_logits, lambda s, p: s.sum() * 0, 4.0, "uniform")
    other = dataclasses.replace(setup, distillation=ignored)
    algorithm = specs.call("algorithm", "dsfl")
    probs = {
        k: dataclasses.replace(u, tensors={"probs": u.tensors["logits"].softmax(-1)})
        for k, u in answers(setup=setup).items()
    }
    assert tensors.equal(*(algorithm.aggregate(k, algorithm.initial_state(k), probs, seed=1) for k in (setup, other)))
    assert setup.distillation.loss is not cross_entropy


def test_fedmd_averages_scores_not_probabilities(setup):
    algorithm = specs.call("algorithm", "fedmd")
    updates = answers(setup=setup)
    state = algorithm.aggregate(setup, algorithm.initial_state(setup), updates, seed=1)
    mean = torch.stack([u.tensors["logits"].double() for u in updates.values()]).mean(0)
    assert torch.allclose(state["logits"].double(), mean, atol=1e-6)
    assert int(algorithm.broadcast(setup, state, 0)["prev"]) == 1
    assert int(algorithm.broadcast(setup, state, 0)["round"]) == 2


def test_fedavg_weights_clients_by_examples(setup):
    algorithm = specs.call("algorithm", "fedavg")
    updates = {0: Update({"w": torch.tensor([0.0])}, 1), 1: Update({"w": torch.tensor([4.0])}, 3)}
    assert algorithm.aggregate(setup, {}, updates, 0)["w"].item() == 3.0


def test_fedprox_without_its_term_is_fedavg(experiment):
    setup, client = experiment.setup, experiment.client(0, 1, {})
    start = setup.trainer.initial_weights(setup.student)
    plain = specs.call("algorithm", "fedavg").local_update(setup, client, start)[0].tensors
    for mu, same in ((0.0, True), (1.0, False)):
        held = specs.call("algorithm", f"fedprox:mu={mu}").local_update(setup, client, start)[0].tensors
        assert tensors.equal(plain, held) is same


def test_central_has_all_samples_and_local_sends_nothing():
    central, local = (prepare(tiny(algorithm=name)) for name in ("central", "local"))
    assert central.clients == 1
    assert sorted(central.training_partition[0]) == sorted(row for part in local.training_partition for row in part)
    assert sorted(central.client(0, 1, {}).data.labels) == sorted(central.train.labels[central.training_partition[0]])
    assert not local.algorithm.upload_spec(local.setup, 0, 1)
    assert not local.algorithm.broadcast(local.setup, {}, 0)


def test_central_trains_on_the_samples_of_the_participants():
    experiment = prepare(tiny(algorithm="central", clients=5, participation=0.4))
    seen = []
    for number in (1, 2, 3):
        chosen = rounds.sample(5, 0.4, experiment.config.seed, number)
        wanted = torch.cat([experiment.train.pixels[torch.from_numpy(experiment.partition[c])] for c in chosen])
        assert torch.equal(experiment.client(0, number, {}).data.pixels, wanted)
        seen.append(chosen)
    assert len(set(map(tuple, seen))) > 1


def test_a_diverged_client_counts_as_wrong_and_is_not_in_the_ensemble():
    experiment = prepare(tiny(algorithm="local"))
    labels, classes = experiment.test.labels, experiment.setup.classes
    right = F.one_hot(labels, classes).float() * 9
    answers = {0: right, 1: right.roll(1, 1), 2: right.roll(1, 1) * 1e6}

    def exchange(kind, number, requests, expected=None):
        return [Reply(c, Update({"logits": t}, len(labels)), "", SerializedBytes()) for c, t in answers.items()]

    updates = {client: Update({}, 5) for client in answers}
    round_ = Round(
        1, {}, updates=updates, failures=[], serialized=SerializedBytes(), downlink=Traffic(), uplink=Traffic()
    )
    found = metrics.evaluate_clients(experiment, exchange, round_)
    assert found.client_accuracy == pytest.approx(1 / 3)
    assert found.failures == [Failure(2, "refused", "sent logits larger than 1,000,000")]
    answers.clear()
    none = metrics.evaluate_clients(experiment, exchange, round_)
    assert (none.client_accuracy, none.teacher) == (None, {})
    assert {failure.cause for failure in none.failures} == {"no reply"}


def test_fedbe_gives_all_models_the_same_weight():
    setup = prepare(tiny(weighting="size")).setup
    two = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    probs = specs.call("algorithm", "fedbe").teacher_probs(setup, two, setup.distillation.client_weights([100, 1]))
    assert torch.allclose(probs, torch.full((1, 2), 0.5))


@pytest.mark.parametrize("name", ["ensemble", "fedema", "cronus", "dsfl:downlink=student"])
def test_epochs_of_a_local_distillation_that_never_happens_are_refused(name):
    with pytest.raises(UsageError, match=r"local-distill-epochs (applies to downlink=labels|does not apply)"):
        specs.call("algorithm", f"{name}{',' if ':' in name else ':'}local_distill_epochs=3")


def test_the_proxy_subset_follows_from_the_round():
    setup = prepare(tiny(proxy_samples=15)).setup
    first, second = setup.proxy.subset(1), setup.proxy.subset(2)
    assert setup.logits_shape == (15, 10)
    assert len(first.unique()) == 15
    assert torch.equal(first, setup.proxy.subset(1))
    assert not torch.equal(first, second)
    assert setup.proxy.subset(10**6).max() < 40


@pytest.mark.parametrize("name", sorted(set(NAMES) - SAME))
def test_clients_may_have_different_architectures(name):
    models, student = "cnn:width=8,resnet8:width=8", "cnn:width=16"
    if name in ("fedproto", "fedtgp"):
        models = "cnn:width=4,resnet8:width=32"
    if name == "fedgkt":
        models, student = "resnet8:width=8,resnet20:width=8", "resnet32:width=8"
    experiment = prepare(tiny(algorithm=QUICK.get(name, name), model=models, student=student, validation=1300))
    algorithm, setup = experiment.algorithm, experiment.setup
    _, memories, state = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {})
    one_round(experiment, algorithm, 2, state, memories)
    shapes = [{k: v.shape for k, v in memories[c].items()} for c in range(3)]
    assert shapes[0] == shapes[2] != shapes[1]
