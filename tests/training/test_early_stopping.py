"""Early stopping gives what a training of the best number of steps gives, which is found by separate trainings."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fedkd.core.tensors import equal
from fedkd.simulate import simulate
from fedkd.simulate.experiment import prepare
from fedkd.training import graphs, loop, models, together
from fedkd.training.early_stopping import EVERY, EarlyStopping
from fedkd.training.requests import Fit
from fedkd.training.stack import Stack
from tests.conftest import simulated, tiny
from tests.simulate.test_resume import SMALL, result_of, resume
from tests.training.test_stack import SCALING, jobs, module, plain, recorded, stacked

RATE = 0.1  # with which the validation accuracy goes up and down
STEPS = 60
NETWORK = "resnet8:width=4,norm=batch"


def chosen(accuracies: dict[int, float], patience: int) -> tuple[int, int]:
    """The best and the last number of steps, where each accuracy is measured after so many steps."""
    best = 0
    for steps, accuracy in accuracies.items():
        if accuracy > accuracies.get(best, -1):
            best = steps
        if steps - best >= patience:
            break
    return best, steps


def work(sizes=(100,), pixels=8):
    return jobs(sizes, pixels, augmentation=lambda _: loop.Augmentation())[0]


def accuracies(job, images, labels, every, **options):
    """The validation accuracy and the network after each of the numbers of steps that are measured until it ends."""
    found = {}
    for steps in range(every, STEPS + 1, every):
        network = module(NETWORK, 0, torch.float32)
        plain(network, job, steps=steps, rate=RATE, **options)
        found[steps] = (loop.predict(network, images, SCALING).argmax(-1) == labels).double().mean().item(), network
        best, _ = chosen({steps: accuracy for steps, (accuracy, _) in found.items()}, every)
        if steps - best >= every:
            break
    return found


def alone(networks):
    stack = Stack(1)
    return stack, stack.alone(copy.deepcopy(networks[0]))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("patience", [3, 12])
def test_it_is_a_training_of_the_best_number_of_steps(patience, average, monkeypatch):
    """In the plain loop, and in that of stacks with and without recorded steps; an epoch has four batches."""
    job, held_out = work(), work((70,))
    images, labels = held_out.pixels, job.targets[:70]  # other images than those that it trains on
    found = accuracies(job, images, labels, patience, average=average)
    best, last = chosen({steps: accuracy for steps, (accuracy, _) in found.items()}, patience)
    assert best + patience == last < STEPS
    wanted = found[best][1].state_dict()
    job = dataclasses.replace(job, stopping=EarlyStopping(images, labels, patience))
    options = {"steps": STEPS, "average": average, "rate": RATE}
    network = module(NETWORK, 0, torch.float32)
    plain(network, job, stopping=job.stopping, **options)
    assert equal(network.state_dict(), wanted)
    for is_recorded in (False, True):
        steps = recorded(monkeypatch) if is_recorded else []
        learner = stacked([module(NETWORK, 0, torch.float32)], [job], build=alone, **options)
        assert len(steps) == is_recorded
        assert all(torch.allclose(each, wanted[name]) for name, each in learner.network.state_dict().items())


def test_the_accuracy_is_measured_every_100_steps_and_after_the_last(monkeypatch):
    seen, predict, job = [], loop.predict, work((20,))
    monkeypatch.setattr(loop, "predict", lambda *given: (seen.append(len(given[1])), predict(*given))[1])
    network = module("cnn:width=4", 0, torch.float32)
    stopping = EarlyStopping(job.pixels[:7], torch.full((7,), -1), 1000)  # never right: the first one is the best
    plain(network, job, steps=250, stopping=stopping, rate=1e-3)
    assert (EVERY, seen) == (100, [7, 7, 7])
    wanted = module("cnn:width=4", 0, torch.float32)
    plain(wanted, job, steps=100, rate=1e-3)
    assert equal(network.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("average", [False, True])
def test_a_training_without_steps_is_the_start(average):
    job, network = work((1,)), module(NETWORK, 0, torch.float32)
    start = copy.deepcopy(network.state_dict())
    plain(network, job, average=average, stopping=EarlyStopping(job.pixels, job.targets, 1))
    assert equal(network.state_dict(), start)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_the_server_distills_as_feddf_does(is_stacked, monkeypatch):
    """Adam with cosine decay over all steps, and the best student, against a loop with PyTorch's own classes."""
    options = {"distill_steps": 60, "distill_schedule": "cosine", "distill_patience": 8, "validation": 90}
    experiment = prepare(tiny(distill_batch_size=16, distill_learning_rate=0.02, **options))
    setup, algorithm = experiment.setup, experiment.algorithm
    held_out = experiment.train.select(torch.from_numpy(experiment.validation_rows))
    assert len(held_out) == 90
    if is_stacked:
        monkeypatch.setattr(together, "pays", lambda _: True)
        monkeypatch.setattr(Fit, "alone", None)
        graphs.forget()
    probs = torch.randn(40, 10, generator=torch.Generator().manual_seed(1)).softmax(-1)
    state = algorithm.initial_state(setup)
    new = algorithm.global_model(setup, algorithm.distill_student(setup, state, torch.arange(40), probs, seed=5))
    student = models.build(setup.student, 10, "group")
    student.load_state_dict(setup.trainer.initial_weights(setup.student))
    optimizer, generator = torch.optim.Adam(student.parameters(), 0.02), torch.Generator().manual_seed(5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    best, best_step, wanted = -1.0, 0, {}
    orders = [torch.randperm(40, generator=generator) for _ in range(20)]
    for number, rows in enumerate([rows for order in orders for rows in order.split(16)], 1):
        student.train()
        optimizer.zero_grad()
        logits = student(setup.trainer.scaling(setup.proxy.images[rows]))
        F.kl_div(logits.log_softmax(-1), probs[rows], reduction="batchmean").backward()
        optimizer.step()
        scheduler.step()
        if number % 8 == 0:
            student.eval()
            with torch.no_grad():
                logits = student(setup.trainer.scaling(held_out.pixels))
            if (accuracy := (logits.argmax(-1) == held_out.labels).float().mean().item()) > best:
                best, best_step, wanted = accuracy, number, copy.deepcopy(student.state_dict())
            if number - best_step >= 8:
                break
    assert 0 < best_step < number < 60
    assert all(torch.allclose(new[name], tensor, atol=1e-4) for name, tensor in wanted.items())


METHODS = ["ensemble", "dsfl", "cfd", "fedgems", "feddf", "fedbe:samples=1", "fed-et"]


def test_in_every_method_whose_server_distills_and_after_an_interruption(tmp_path):
    """A run that is extended has the bits of one run. The rate is so high that the last step is not the best."""
    options = {"algorithm": METHODS[0], "compare": " ".join(METHODS[1:]), **SMALL, "proxy": "holdout:size=40"}
    options |= {"validation": 40, "distill_patience": 1, "distill_batch_size": 8, "distill_learning_rate": 0.5}
    simulate(tiny(**options, rounds=2, out=str(tmp_path / "whole")))
    simulate(tiny(**options, rounds=1, out=str(tmp_path / "parts")))
    resume(tmp_path / "parts", rounds=2)
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")
    never = simulated(tmp_path / "never", **options | {"distill_patience": 0, "rounds": 1})
    loss = {row["algorithm"]: row["test_loss"] for row in result_of(tmp_path / "whole")["rows"] if row["round"] == 1}
    assert all(loss[row["algorithm"]] != row["test_loss"] for row in never)
