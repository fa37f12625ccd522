"""Losses against PyTorch and against slow versions written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedkd.training.losses.logits import cross_entropy, kl, logit_mae, mse


@pytest.fixture
def pair(generator):
    return torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator).mul(3).softmax(-1)


def by_hand(student, teacher, term):
    """Mean over the batch of a sum over classes, written as loops."""
    total = 0.0
    for logits, probs in zip(student.tolist(), teacher.tolist(), strict=True):
        z = math.fsum(math.exp(v) for v in logits)
        total += math.fsum(term(p, math.exp(v) / z) for v, p in zip(logits, probs, strict=True))
    return total / len(student)


@pytest.mark.parametrize(
    ("loss", "term"),
    [
        (cross_entropy, lambda p, q: -p * math.log(q)),
        (kl, lambda p, q: p * math.log(p / q)),
        (mse, lambda p, q: (p - q) ** 2),
    ],
)
def test_against_the_formula_in_loops(pair, loss, term):
    assert loss(*pair).item() == pytest.approx(by_hand(*pair, term), rel=1e-5)


def test_against_pytorch(pair):
    student, teacher = pair
    assert kl(student, teacher).item() == pytest.approx(
        F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean").item(), rel=1e-5
    )
    assert cross_entropy(student, teacher).item() == pytest.approx(F.cross_entropy(student, teacher).item(), rel=1e-5)
    assert logit_mae(student, teacher).item() == pytest.approx(F.l1_loss(student, teacher).item(), rel=1e-6)


def test_kl_is_zero_for_equal_distributions_even_for_a_one_hot_teacher(pair):
    student = pair[0]
    assert kl(student, student.softmax(-1)).abs() < 1e-6
    assert kl(torch.tensor([[100.0, 0.0]]), torch.tensor([[1.0, 0.0]])).abs() < 1e-6


def test_kl_and_cross_entropy_have_equal_gradients(pair):
    student, teacher = pair
    gradients = [
        torch.autograd.grad(loss(s := student.clone().requires_grad_(), teacher), s)[0] for loss in (kl, cross_entropy)
    ]
    assert torch.allclose(*gradients, atol=1e-7)
    expected = (student.softmax(-1) - teacher) / len(student)  # the closed form
    assert torch.allclose(gradients[0], expected, atol=1e-6)


def test_the_squared_temperature_keeps_the_gradient_of_logit_matching(experiment):
    """At a high temperature, T^2 * KL has the gradient of matching centered logits (Hinton et al., 2015, eq. 4)."""
    import dataclasses

    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 10, generator=generator).double()
    hot = 1000.0
    distillation = dataclasses.replace(experiment.setup.distillation, temperature=hot)
    variable = student.clone().requires_grad_()
    gradient = torch.autograd.grad(distillation.objective(variable, (teacher / hot).softmax(-1)), variable)[0]
    centered = [v - v.mean(-1, keepdim=True) for v in (student, teacher)]
    assert torch.allclose(gradient, (centered[0] - centered[1]) / 10 / 6, rtol=1e-2, atol=1e-5)
