"""Losses on feature maps, against torchdistill and against loops written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchdistill.losses import mid_level

from fedkd.training.losses.features import RAW_VARIANCE, attention, hint, nst, vid

CLOSE = {"rel": 1e-6, "abs": 1e-12}
SIDES = {side: {"io": "o", "path": "x"} for side in ("student", "teacher")}


def maps(generator, *channels):
    return [torch.randn(6, c, 4, 3, generator=generator, dtype=torch.float64) for c in channels]


def test_hint_is_the_mean_square(generator):
    student, teacher = maps(generator, 5, 5)
    assert hint(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item(), **CLOSE)


def test_attention_is_torchdistills_for_any_channels(generator):
    student, teacher = maps(generator, 3, 8)
    theirs = mid_level.ATLoss({"pair": SIDES}, mode="code")({"x": {"o": student}}, {"x": {"o": teacher}})
    assert attention(student, teacher).item() == pytest.approx(theirs.item(), **CLOSE)


def test_attention_against_the_formula(generator):
    student, teacher = maps(generator, 3, 8)
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        a, b = ((side**2).mean(0).ravel() for side in (s, t))
        total += np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
    assert attention(student, teacher).item() == pytest.approx(total / 6 / 12, **CLOSE)


def test_nst_against_the_formula(generator):
    student, teacher = maps(generator, 3, 5)
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        ours, theirs = ([c.ravel() / np.linalg.norm(c) for c in side] for side in (s, t))
        for sign, left, right in ((1, ours, ours), (1, theirs, theirs), (-2, ours, theirs)):
            total += sign * sum((x @ y) ** 2 for x in left for y in right) / len(left) / len(right)
    assert nst(student, teacher).item() == pytest.approx(total / 6, **CLOSE)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5)])
def test_vid_is_torchdistills(generator, shape):
    mean, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    raw = torch.randn(5, generator=generator, dtype=torch.float64)
    variance = (F.softplus(raw) + 1e-5).view(1, 5, *[1] * (len(shape) - 2)).expand(shape)
    theirs = mid_level.VIDLoss({"pair": SIDES})({"x": {"o": (mean, variance)}}, {"x": {"o": teacher}})
    assert vid(mean, raw, teacher).item() == pytest.approx(theirs.item(), **CLOSE)


def test_vid_starts_at_variance_five(generator):
    features = maps(generator, 5)[0]
    loss = vid(features, torch.full((5,), RAW_VARIANCE, dtype=torch.float64), features)
    assert loss.item() == pytest.approx(np.log(5) / 2, rel=1e-12)


def test_vid_learns_the_variance(generator):
    """The best variance of a channel is its mean squared error."""
    mean, teacher = maps(generator, 5, 5)
    best = (mean - teacher).square().mean((0, 2, 3))
    raw = torch.log(torch.expm1(best - 1e-5)).requires_grad_()
    assert torch.autograd.grad(vid(mean, raw, teacher), raw)[0].abs().max() < 1e-12


def test_shapes_that_cannot_be_compared_are_refused(generator):
    """Rather than broadcast."""
    student, teacher = maps(generator, 1, 5)
    raw = torch.zeros(5, dtype=torch.float64)
    for loss in (hint, lambda s, t: vid(s, raw, t)):
        with pytest.raises(ValueError, match="equal shapes"):
            loss(student, teacher)
    for loss in (attention, nst):
        for other in (teacher[..., :1], teacher[:1], teacher.flatten(1)):
            with pytest.raises(ValueError, match="H x W"):
                loss(student, other)
            with pytest.raises(ValueError, match="H x W"):
                loss(other, student)
