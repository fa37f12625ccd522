"""The newer losses on logits, against torchdistill and against loops written from the papers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchdistill.losses import mid_level

from fedkd.core import specs
from fedkd.core.errors import UsageError
from fedkd.training.losses import output_relations, relations
from fedkd.training.losses.logits import dist, dkd, kl, logit_mse, multi_level, standardized

CLOSE = {"rel": 1e-6, "abs": 1e-12}
HERE = {"student_module_path": "x", "student_module_io": "o", "teacher_module_path": "x", "teacher_module_io": "o"}


@pytest.fixture
def pair(generator):
    """Logits of both sides."""
    return 2 * torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)


def torchdistill(name: str, student, teacher, targets=None, **options):
    loss = getattr(mid_level, name)(**HERE, **options)
    return loss({"x": {"o": student}}, {"x": {"o": teacher}}, targets).item()


def softmax(values):
    powers = np.exp(values - np.max(values))
    return powers / powers.sum()


def divergence(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_logit_mse_is_pytorchs(pair):
    assert logit_mse(*pair).item() == pytest.approx(F.mse_loss(*pair).item(), **CLOSE)


def by_hand_dkd(student, teacher, targets, alpha, beta):
    total = 0.0
    for s, t, label in zip(student.numpy(), teacher.numpy(), targets.tolist(), strict=True):
        p, q = softmax(t), softmax(s)
        others = [c for c in range(len(p)) if c != label]
        binary = divergence((p[label], 1 - p[label]), (q[label], 1 - q[label]))
        rest = divergence(softmax(t[others]), softmax(s[others]))
        total += alpha * binary + beta * rest
    return total / len(student)


def test_dkd_against_the_formula(pair, generator):
    student, teacher = pair
    labels = torch.randint(5, (7,), generator=generator)
    probs = teacher.softmax(-1)
    assert (labels != probs.argmax(-1)).any()
    expected = by_hand_dkd(student, teacher, labels, 0.5, 3.0)
    assert dkd(student, probs, labels, alpha=0.5, beta=3.0).item() == pytest.approx(expected, **CLOSE)
    expected = by_hand_dkd(student, teacher, teacher.argmax(-1), 1.0, 8.0)
    assert dkd(student, probs).item() == pytest.approx(expected, **CLOSE)


def test_dkd_with_beta_of_the_other_classes_probability_is_kl(pair):
    """KD = TCKD + (1 - p_target) NCKD, image by image (Zhao et al., 2022)."""
    student, teacher = pair
    for s, p in zip(student.split(1), teacher.softmax(-1).split(1), strict=True):
        assert dkd(s, p, beta=1 - p.max().item()).item() == pytest.approx(kl(s, p).item(), **CLOSE)


def test_dkd_ignores_the_other_classes_of_a_one_hot_teacher(pair):
    probs = F.one_hot(pair[1].argmax(-1), 5).double()
    assert dkd(pair[0], probs).item() == pytest.approx(kl(pair[0], probs).item(), **CLOSE)


def test_dist_is_torchdistills(pair):
    student, teacher = pair
    theirs = torchdistill("DISTLoss", student, teacher, beta=2.0, gamma=0.5)
    assert dist(student, teacher.softmax(-1), inter=2.0, intra=0.5).item() == pytest.approx(theirs, **CLOSE)


def test_dist_counts_a_class_that_does_not_vary_as_uncorrelated(pair):
    """By name: the teacher is sure of the first class everywhere, so that only the student varies."""
    probs = F.one_hot(torch.zeros(7, dtype=torch.long), 5).double()
    assert dist(pair[0], probs, inter=0.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_standardized_is_torchdistills_at_any_temperature_of_the_run(pair, temperature, heat):
    student, teacher = pair
    # Without its cross-entropy theirs leaves out the square of tau; its eps would show in the sixth digit.
    theirs = torchdistill("LogitStdKDLoss", student, teacher, temperature=temperature, alpha=0, eps=0.0)
    ours = standardized(student / heat, (teacher / heat).softmax(-1), temperature=temperature)
    assert ours.item() == pytest.approx(temperature**2 * theirs, **CLOSE)


def by_hand_multi_level(student, teacher, temperatures, instance, batch, classes):
    total = 0.0
    for tau in temperatures:
        q, p = (np.array([softmax(row / tau) for row in side.numpy()]) for side in (student, teacher))
        rows, columns = p.shape
        total += instance * tau**2 * sum(divergence(*both) for both in zip(p, q, strict=True)) / rows
        for i in range(rows):
            total += batch * sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for j in range(rows)) / rows
        for i in range(columns):
            total += classes * sum((p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 for j in range(columns)) / columns
    return total


@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_multi_level_against_the_formula(pair, heat):
    student, teacher = pair
    expected = by_hand_multi_level(student / heat, teacher / heat, (2, 3, 4, 5, 6), 1, 1, 1)
    assert multi_level(student / heat, (teacher / heat).softmax(-1)).item() == pytest.approx(expected, **CLOSE)
    expected = by_hand_multi_level(student, teacher, (1.5, 7), 0.5, 2, 3)
    ours = multi_level(student, teacher.softmax(-1), temperatures=(1.5, 7), instance=0.5, batch=2, classes=3)
    assert ours.item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("name", ["rkd", "similarity", "correlation", "pkt"])
def test_relations_of_outputs_are_those_of_the_rows_plus_kl(pair, name):
    student, probs = pair[0], pair[1].softmax(-1)
    options = {key: p.default for key, p in inspect.signature(getattr(output_relations, name)).parameters.items()}
    weight = options["weight"]
    relation = getattr(relations, name)(student.softmax(-1), probs).item()
    assert relation > 0
    ours = getattr(output_relations, name)
    assert ours(student, probs, kl=0.0).item() == pytest.approx(weight * relation, **CLOSE)
    assert ours(student, probs, kl=2.0).item() == pytest.approx(weight * relation + 2 * kl(student, probs).item())
    for key, parameter in inspect.signature(getattr(relations, name)).parameters.items():
        assert parameter.default in (inspect.Parameter.empty, options.get(key)), key


def test_options_of_relations_reach_them(pair):
    student, probs = pair[0], pair[1].softmax(-1)
    for name, options in (("rkd", {"distance": 2.0, "angle": 3.0}), ("correlation", {"gamma": 1.5, "order": 4})):
        expected = getattr(relations, name)(student.softmax(-1), probs, **options).item()
        ours = getattr(output_relations, name)(student, probs, **options, weight=5.0, kl=0.0)
        assert ours.item() == pytest.approx(5 * expected, **CLOSE)


def test_a_relation_does_not_change_when_classes_are_permuted(pair):
    """The reason why `output_relations` adds kl."""
    student, probs = pair[0], pair[1].softmax(-1)
    moved = student.roll(1, dims=1)
    for name in ("rkd", "similarity", "correlation", "pkt"):
        loss = getattr(output_relations, name)
        assert loss(moved, probs, kl=0.0).item() == pytest.approx(loss(student, probs, kl=0.0).item(), **CLOSE)
        assert loss(moved, probs).item() != pytest.approx(loss(student, probs).item(), rel=1e-5)


def test_options_are_read_from_the_command_line(pair):
    student, probs = pair[0], pair[1].softmax(-1)
    bound = specs.bind("loss", "multi-level:temperatures=2+4.5,batch=0")
    assert bound(student, probs) == multi_level(student, probs, temperatures=(2.0, 4.5), batch=0.0)
    assert specs.bind("loss", "dkd:beta=2")(student, probs) == dkd(student, probs, beta=2.0)
    assert specs.bind("loss", "rkd:angle=0,kl=0")(student, probs) == output_relations.rkd(
        student, probs, angle=0.0, kl=0.0
    )


@pytest.mark.parametrize(
    "text",
    [
        "dkd:alpha=-1",
        "dkd:labels=1",
        "dist:inter=inf",
        "standardized:temperature=0",
        "multi-level:temperatures=2+0",
        "multi-level:temperatures=+",
        "correlation:order=0",
        "pkt:weight=nan",
    ],
)
def test_invalid_options_are_refused(text):
    with pytest.raises(UsageError):
        specs.bind("loss", text)
