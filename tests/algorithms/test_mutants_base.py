"""The protocol's own parts: what a method gets without writing it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedkd.algorithms.base import Algorithm, Client, Distillation, Setup, Update
from fedkd.core.seeds import derive


class Silent(Algorithm):
    """Says nothing and hears nothing."""

    def local_update(self, setup, client, message):
        return Update({}, 1), {}


def distillation(temperature=4.0, weighting="size", calls=None):
    calls = [] if calls is None else calls

    def first(logits, weights):
        calls.append((logits, weights))
        return logits[0]

    def loss(student, teacher):
        calls.append((student, teacher))
        return (student * teacher).sum()

    return Distillation(first, loss, temperature, weighting)


def setup_with(**parts):
    empty = {"config": None, "classes": 3, "models": ("a", "b"), "student": "s", "proxy": None, "distillation": None}
    return Setup(**{**empty, "validation": None, "trainer": None, **parts})


def test_the_aggregator_gets_logits_over_the_temperature_and_the_weights():
    calls = []
    weights = torch.ones(2, 1)
    logits = (torch.tensor([[8.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    teacher = distillation(calls=calls).teacher_probs(logits, weights)
    assert teacher.tolist() == [[2.0, 1.0]]
    assert calls[0][0].tolist() == [[[2.0, 1.0]], [[0.5, 0.0]]]
    assert calls[0][1] is weights


def test_weights_are_the_numbers_of_examples_or_ones():
    by_size = distillation().client_weights([3, 1, 7])
    assert by_size.tolist() == [[3.0], [1.0], [7.0]]
    assert by_size.dtype == torch.float32
    assert distillation(weighting="uniform").client_weights([3, 1, 7]).tolist() == [[1.0], [1.0], [1.0]]


def test_the_objective_is_the_squared_temperature_times_the_loss():
    calls = []
    teacher = torch.tensor([[0.25, 0.75]])
    value = distillation(calls=calls).objective(torch.tensor([[8.0, 4.0]]), teacher)
    assert calls[0][0].tolist() == [[2.0, 1.0]]
    assert calls[0][1] is teacher
    assert value.item() == 16 * (2.0 * 0.25 + 1.0 * 0.75)
    assert distillation(3.0).objective(torch.tensor([[3.0]]), torch.ones(1, 1)).item() == 9.0


def test_models_are_assigned_in_turn():
    assert [setup_with(models=("a", "b", "c")).model_of(client) for client in range(5)] == ["a", "b", "c", "a", "b"]


def test_a_client_starts_from_the_initial_weights_and_then_from_its_own():
    initial = {"w": torch.zeros(1)}
    trainer = SimpleNamespace(initial_weights=lambda model: initial if model == "b" else None)
    setup = setup_with(trainer=trainer)
    own = torch.ones(1)
    assert setup.local_weights(Client(1, 0, "b", None, {})) is initial
    assert setup.local_weights(Client(1, 0, "b", None, {"models/w": own, "control/w": own})) is initial
    assert setup.local_weights(Client(1, 0, "b", None, {"model/w": own, "control/w": initial["w"]})) == {"w": own}


def test_proxy_logits_are_those_of_the_model_on_the_proxy_samples_of_the_round():
    images = torch.arange(10)
    subset = lambda number: torch.tensor([number, number + 2])  # noqa: E731
    proxy = SimpleNamespace(select=images.__getitem__, subset=subset, samples=2)
    trainer = SimpleNamespace(predict=lambda model, weights, images: (model, weights, images.tolist()))
    setup = setup_with(proxy=proxy, trainer=trainer)
    weights = {"w": torch.zeros(1)}
    assert setup.proxy_logits("cnn", weights, 5) == ("cnn", weights, [5, 7])
    assert setup.logits_shape == (2, 3)


def test_a_seed_of_a_client_is_named_by_its_purpose():
    client = Client(3, 11, "cnn", None, {})
    assert client.derive("train") == derive(11, "train")
    assert client.derive("train") != client.derive("distill")


def test_the_defaults_of_a_method_send_nothing_and_keep_the_state():
    method, setup = Silent(), setup_with(distillation=distillation())
    state = {"x": torch.ones(1)}
    update, memory = method.local_update(setup, Client(0, 0, "a", None, {}), {})
    assert (update, memory) == (Update({}, 1), {})
    assert method.initial_state(setup) == {}
    assert method.broadcast(setup, state, 0) == {}
    assert method.upload_spec(setup, 0, 1) == {}
    assert method.check_update(setup, update) == ""
    assert method.aggregate(setup, state, {0: update}, 0) is state
    assert method.global_model(setup, state) == {}
    assert method.codecs is None
    assert (method.needs_one_model, method.pools_data, method.reads_proxy_labels) == (False, False, False)


def test_the_teacher_of_a_method_is_by_default_that_of_the_run():
    calls = []
    setup = setup_with(distillation=distillation(calls=calls))
    weights = torch.tensor([[2.0], [1.0]])
    logits = [torch.tensor([[4.0, 8.0]]), torch.tensor([[0.0, 0.0]])]
    assert Silent().teacher_probs(setup, logits, weights).tolist() == [[1.0, 2.0]]
    assert calls[0][1] is weights


def test_a_method_must_say_what_its_clients_do():
    with pytest.raises(TypeError, match="local_update"):
        Algorithm()
