"""Distillation by a recorded training step, as on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedkd.core import notes
from fedkd.core.tensors import equal
from fedkd.distill import check, train
from fedkd.distill.config import DistillConfig
from fedkd.distill.task import prepare
from fedkd.training import graphs, models, together
from tests.training import replays

PAIR = "resnet8:width=4 cnn:width=4"
LOSSES = {
    "logits:kind=dkd logits:kind=dist logits:kind=logit-mse logits:kind=mse logits:kind=standardized": PAIR,
    "features features:kind=attention features:kind=nst features:kind=vid": PAIR,
    "relations relations:kind=similarity relations:kind=correlation relations:kind=pkt": "cnn:width=4",
    "graph": "resnet8:width=4",
    "exits": "",
}


def states(start: int, state: dict[str, torch.Tensor], **changes):
    """The functions of the state after each of two epochs, from ``start`` on.

    Images are augmented; the last batch of an epoch is smaller than the others.
    """
    options = {"dataset": "noise:size=90", "student": "resnet8:width=4", "teacher": "cnn:width=4", "validation": 8}
    config = DistillConfig.parse({**options, "batch_size": 16, "device": "cpu", **changes})
    terms, (task, _) = check(config), prepare(config)
    teachers = []
    for name in config.teacher.split() if any(term.needs_teacher for term in terms) else ():
        torch.manual_seed(len(teachers))
        teachers.append(models.build(name, 10, "batch").to(task.device).eval().requires_grad_(False))

    module = train.build_untrained(task, config, config.student)
    options = {"epochs": 2, "seed": 3, "terms": terms, "teachers": teachers, "start": start, "state": state}
    return (state_of() for _, state_of in train.train(module, task, config, **options))


def trained(resumed: bool = False, **changes) -> dict[str, torch.Tensor]:
    """What a third epoch would depend on. If ``resumed``, the second one continues from the state after the first."""
    first = states(0, {}, **changes)
    if resumed:
        return next(states(1, next(first), **changes))
    _, second = first
    return second


@pytest.fixture
def recorded(monkeypatch):
    """A function that trains as on a GPU, where steps are recorded; here by a recorder for a CPU."""

    def train(**changes):
        with monkeypatch.context() as patched:
            patched.setattr(together, "pays", lambda device: True)
            patched.setattr(graphs, "recorder", lambda device: replays.Replay)
            patched.setattr(replays.Replay, "count", 0)
            notes.say.cache_clear()
            return trained(**changes), replays.Replay.count

    return train


@pytest.mark.parametrize("loss", LOSSES)
def test_a_recorded_step_does_the_same_to_the_bit(loss, recorded):
    """Five batches of two epochs; not the first step, which must be run before, nor the smaller batches."""
    changes = {"loss": loss, "teacher": LOSSES[loss]}
    state, replayed = recorded(**changes)
    assert equal(state, trained(**changes))
    assert replayed == 4 + 5


def test_an_epoch_has_the_rate_of_its_schedule(recorded):
    """The second of two epochs has a tenth of the rate of the first one, which is that of a run of constant rates."""
    options = {"loss": "logits", "teacher": "cnn:width=4", "schedule": "step:milestones=1,gamma=0.1"}
    state = trained(**options)
    assert equal(recorded(**options)[0], state)
    first = next(states(0, {}, schedule="constant", learning_rate=0.05, loss="logits", teacher="cnn:width=4"))
    wanted = states(1, first, schedule="constant", learning_rate=0.005, loss="logits", teacher="cnn:width=4")
    assert equal(next(wanted), state)


def test_an_epoch_has_the_weight_of_its_warm_up(recorded):
    """In the first and second of four epochs the term counts a quarter and a half; the labels count as always.

    Quarters are exact, so the weights of the network are those of runs with these constant weights, to the bit.
    """
    options = {"loss": "logits:kind=dkd,weight=1,hard=1", "teacher": "cnn:width=4", "loss_warmup": 4}
    state, replayed = recorded(**options)
    assert equal(state, trained(**options))
    assert replayed == 4 + 5
    first = next(states(0, {}, loss="logits:kind=dkd,weight=0.25,hard=1", teacher="cnn:width=4"))
    assert equal(next(states(1, first, loss="logits:kind=dkd,weight=0.5,hard=1", teacher="cnn:width=4")), state)
    assert equal(recorded(resumed=True, **options)[0], state)
    assert equal(trained(**options | {"loss_warmup": 1}), trained(**options | {"loss_warmup": 0}))


@pytest.mark.parametrize("weighting", ["entropy", "agreement"])
def test_so_it_does_with_weights_of_teachers_and_if_training_is_resumed(weighting, recorded):
    changes = {"loss": "logits features", "teacher_weighting": weighting, "teacher": "cnn:width=4 cnn:width=8"}
    state, replayed = recorded(resumed=True, **changes)
    assert equal(state, trained(**changes))
    assert replayed == 4 + 4


MINE = """
import torch
from torch import nn
from torch.nn import functional as F

def loss(student_logits, teacher_probs):
    return (student_logits.softmax(-1) - teacher_probs).square().mean()

class Dropping(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer, self.drop = nn.Linear(3 * 32 * 32, classes), nn.Dropout(0.2)

    def forward(self, x):
        return self.layer(self.drop(x.flatten(1)))

class Drawing(Dropping):
    def forward(self, x):
        return self.layer(F.dropout(x.flatten(1), 0.2, self.training))
"""


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({"loss": "contrastive:negatives=8"}, "steps with ContrastiveTerm are not recorded"),
        ({"loss": "logits:kind=./mine.py:loss"}, "steps with LogitsTerm are not recorded"),
        ({"student": "./mine.py:Dropping"}, "step that draws random numbers is not recorded"),
        ({"student": "./mine.py:Drawing"}, "step that draws random numbers is not recorded"),
    ],
)
def test_a_step_that_may_change_is_not_recorded(changes, noted, recorded, tmp_path, monkeypatch, capsys):
    """With terms that draw numbers or are user-defined, and networks that draw numbers; with the same results."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    state, replayed = recorded(**changes)
    assert noted in capsys.readouterr().err
    assert replayed == 0
    assert equal(state, trained(**changes))


def test_a_step_that_cannot_be_recorded_is_run_and_said_to_be_once(recorded, monkeypatch, capsys):
    def refuse(step):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(replays, "Replay", refuse)
    refuse.count = 0
    assert equal(recorded()[0], trained())
    assert capsys.readouterr().err.count("cannot be recorded as a CUDA graph") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu_a_recorded_step_does_the_same_to_the_bit(loss, monkeypatch):
    """As the plain loop on the same GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    changes = {"loss": loss, "teacher": LOSSES[loss]}
    record, recordings = graphs.record, []
    monkeypatch.setattr(graphs, "record", lambda *arguments: (recordings.append(1), record(*arguments))[1])
    state = trained(device="cuda", **changes)
    assert recordings
    monkeypatch.setattr(together, "pays", lambda device: False)
    assert equal(state, trained(device="cuda", **changes))
