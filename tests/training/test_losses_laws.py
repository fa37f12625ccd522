"""What holds for every loss: where it is least, what it does not see, and that its gradients can be used."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.training.losses import features, graph, logits, relations
from fedkd.training.losses.vectors import length, standard, unit

RAW = torch.full((5,), features.RAW_VARIANCE, dtype=torch.float64)


def layered(student, teacher):
    """Three layers of student and teacher, derived from one."""
    sides = [[side, side.tanh(), 2 * side.roll(1, 1)] for side in (student, teacher)]
    return graph.graph(*sides, edge_move=1.0)


# Each takes a student and a teacher of one shape; those of the catalog take the teacher's probabilities.
ON_PROBS = {name: specs.bind("loss", name) for name in CATALOG["loss"]}
ROWS = {
    "logit_mae": logits.logit_mae,
    "logit_mse": logits.logit_mse,
    "hint": features.hint,
    "vid": lambda s, t: features.vid(s, RAW.to(s), t),
    "rkd of features": relations.rkd,
    "similarity of features": relations.similarity,
    "correlation of features": relations.correlation,
    "pkt of features": relations.pkt,
    "graph": layered,
}
MAPS = {
    "hint of maps": features.hint,
    "attention": features.attention,
    "nst": features.nst,
    "vid of maps": lambda s, t: features.vid(s, RAW.to(s), t),
    "rkd of maps": relations.rkd,
    "graph of maps": layered,
}
LOSSES = {**ON_PROBS, **ROWS, **MAPS}
LEAST = {"vid": RAW.exp().add(1).log().add(1e-5).log().mean().item() / 2}  # log(5) / 2
LEAST["vid of maps"] = LEAST["vid"]

every = pytest.mark.parametrize("name", LOSSES)


def draw(name, seed, dtype=torch.float64, batch=7):
    shape = (batch, 5, 3, 2) if name in MAPS else (batch, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_teacher(name, drawn):
    return drawn.softmax(-1) if name in ON_PROBS else drawn


def gradient(name, student, teacher):
    variable = student.clone().requires_grad_()
    loss = LOSSES[name](variable, teacher)
    assert loss.shape == ()
    assert loss.dtype == student.dtype
    assert loss.isfinite()
    return torch.autograd.grad(loss, variable)[0]


@every
def test_the_minimum_is_where_the_student_equals_the_teacher(name):
    student = draw(name, 0)
    teacher = as_teacher(name, student)
    least = LOSSES[name](student, teacher).item()
    if name == "ce":
        assert least == pytest.approx(-(teacher * teacher.log()).sum(-1).mean().item())
    else:
        assert least == pytest.approx(LEAST.get(name, 0.0), abs=1e-12)
    for seed in range(1, 20):
        assert LOSSES[name](student + 0.1 * draw(name, seed), teacher).item() > least
    if name != "logit_mae":  # which has an edge there
        assert gradient(name, student, teacher).abs().max() < 1e-6


@every
def test_the_order_of_samples_does_not_matter(name):
    student, teacher = draw(name, 0), as_teacher(name, draw(name, 1))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    loss = LOSSES[name](student, teacher).item()
    assert LOSSES[name](student[order], teacher[order]).item() == pytest.approx(loss, rel=1e-9)
    assert LOSSES[name](student[order], teacher).item() != pytest.approx(loss, rel=1e-6)


@every
def test_gradients_of_student_and_teacher_are_the_numeric_ones(name):
    """Losses detach nothing; for no gradient at the teacher, pass tensors that do not require one."""
    student, teacher = draw(name, 0, batch=4), as_teacher(name, draw(name, 1, batch=4))
    assert torch.autograd.gradcheck(LOSSES[name], (student.requires_grad_(), teacher.requires_grad_()))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_inputs_is_kept(name, dtype):
    student, teacher = draw(name, 0), as_teacher(name, draw(name, 1))
    found = gradient(name, student.to(dtype), teacher.to(dtype))
    assert found.dtype == dtype
    assert found.norm() > 1e-6
    exact = gradient(name, student, teacher)
    assert (found - exact).norm() < 1e-4 * exact.norm()


def one_hot(name, drawn):
    """A one-hot teacher; as features, all but one of each sample are zero."""
    return F.one_hot(drawn.flatten(1).argmax(-1), drawn.flatten(1).shape[1]).to(drawn).view_as(drawn)


def uniform(name, drawn):
    return torch.full_like(drawn, 1 / drawn.shape[-1])


HARD = {
    "a one-hot teacher": lambda n, s, t: (s, one_hot(n, t)),
    "a one-hot teacher of one class": lambda n, s, t: (s, one_hot(n, t[:1]).expand_as(t)),
    "a uniform teacher": lambda n, s, t: (s, uniform(n, t)),
    "two rows alike": lambda n, s, t: (torch.cat([s[:1], s[:-1]]), as_teacher(n, t)),
    "two rows alike at the teacher": lambda n, s, t: (s, as_teacher(n, torch.cat([t[:1], t[:-1]]))),
    "all rows alike": lambda n, s, t: (s[:1].expand_as(s), as_teacher(n, t)),
    "all rows alike at both": lambda n, s, t: (s[:1].expand_as(s), as_teacher(n, t[:1].expand_as(t))),
    "a student of zeros": lambda n, s, t: (torch.zeros_like(s), as_teacher(n, t)),
    "one row of zeros": lambda n, s, t: (torch.cat([torch.zeros_like(s[:1]), s[1:]]), as_teacher(n, t)),
    "a certain student that is wrong": lambda n, s, t: (100 * one_hot(n, s), one_hot(n, t)),
    "a batch of one": lambda n, s, t: (s[:1], as_teacher(n, t[:1])),
    "two classes": lambda n, s, t: (s[:, :2], t[:, :2].softmax(-1)) if n in ON_PROBS else (s, t),
}


@every
@pytest.mark.parametrize("case", HARD)
def test_the_gradient_is_finite_and_bounded(name, case):
    """`normalize` and `cosine_similarity` are finite at zero too, with gradients of 1e8 to 1e12."""
    student, teacher = HARD[case](name, draw(name, 0, torch.float32), draw(name, 1, torch.float32))
    found = gradient(name, student, teacher)
    assert found.isfinite().all()
    assert found.abs().max() < 1e4


def test_lengths_and_directions_at_zero():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]]).requires_grad_()
    assert length(vectors).tolist() == [5.0, 0.0, 0.0]
    assert torch.allclose(unit(vectors), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    for function in (length, unit):
        found = torch.autograd.grad(function(vectors)[..., 0].sum(), vectors)[0]
        assert found[0].norm() > 0
        assert found[1:].eq(0).all()


def test_standard_of_a_constant_is_zero():
    values = torch.full((3, 1000), 0.1) * torch.tensor([[1.0], [7.0], [1e4]])
    assert (values - values.mean(-1, keepdim=True)).abs().max() > 0  # rounding
    assert standard(values).eq(0).all()
    drawn = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([[1.0, *torch.corrcoef(drawn)[0, 1:]]])
    assert torch.allclose(standard(drawn)[:1] @ standard(drawn).mT, expected, atol=1e-6)
    assert standard(1 + 1e-4 * drawn).norm(dim=-1).allclose(torch.ones(3))
