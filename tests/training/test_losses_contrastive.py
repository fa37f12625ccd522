"""Contrastive distillation: objective and memory against torchdistill; sampling of negatives."""

from __future__ import annotations

import math

import pytest
import torch
from torchdistill.losses import mid_level

from fedkd.training.losses.contrastive import Memory, crd, normalizers
from fedkd.training.losses.vectors import unit

ROWS, WIDTH, NEGATIVES = 64, 6, 9  # torchdistill's table of odds fails where 1 / ROWS is not exact
HOT = 0.0625  # and it keeps the temperature in float32


@pytest.fixture
def memory(generator):
    memory = Memory.random(torch.arange(ROWS) % 5, WIDTH, generator)
    memory.student, memory.teacher = memory.student.double(), memory.teacher.double()
    return memory


@pytest.fixture
def batch(generator):
    """Row numbers and embeddings of both sides."""
    embeddings = unit(torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64))
    return torch.tensor([3, 50, 11, 20]), *embeddings


def test_objective_and_memory_are_torchdistills(memory, batch, generator):
    rows, student, teacher = batch
    chosen = memory.others(rows, NEGATIVES, generator)
    theirs = mid_level.CRDLoss("n", "e", "n", WIDTH, ROWS, NEGATIVES, ROWS, temperature=HOT, eps=0.0).double()
    theirs.memory_v1.copy_(memory.student)
    theirs.memory_v2.copy_(memory.teacher)
    io = {
        "n": {"output": student},
        "e": {"input": {"pos_idx": rows, "contrast_idx": torch.cat([rows[:, None], chosen], 1)}},
    }
    expected = theirs(io, {"n": {"output": teacher}}).item()

    own = torch.cat([rows[:, None], chosen], 1)
    held = (student, teacher, memory.student[own], memory.teacher[own], ROWS)
    constants = normalizers(*held, temperature=HOT)
    assert constants == pytest.approx(tuple(theirs.params[2:4].tolist()), rel=1e-6)
    assert crd(*held, constants=constants, temperature=HOT).item() == pytest.approx(expected, rel=1e-6)

    memory.update(rows, student, teacher)
    moved = unit(student + 0.3 * student.roll(1, 0))
    theirs({**io, "n": {"output": moved}}, {"n": {"output": teacher}})
    memory.update(rows, moved, teacher)
    assert torch.allclose(memory.student, theirs.memory_v1, rtol=0, atol=1e-12)
    assert torch.allclose(memory.teacher, theirs.memory_v2, rtol=0, atol=1e-12)


def test_objective_against_the_formula(memory, batch, generator):
    """The paper's h, without Z, in loops; the mean over the batch, the sum over sides."""
    rows, student, teacher = batch
    ours, theirs = memory.candidates(rows, NEGATIVES, generator)
    total = 0.0
    for anchors, candidates in ((student, theirs), (teacher, ours)):
        for anchor, others in zip(anchors, candidates, strict=True):
            for place, other in enumerate(others):
                is_pair = place == 0
                x = math.exp(float(anchor @ other) / 0.07)
                h = x / (x + NEGATIVES / ROWS)
                total -= math.log(h if is_pair else 1 - h) / 4
    assert crd(student, teacher, ours, theirs, ROWS).item() == pytest.approx(total, rel=1e-6)


def test_the_objective_pairs_the_embeddings_of_each_sample(memory, batch, generator):
    rows, _, _ = batch
    ours, theirs = memory.candidates(rows, NEGATIVES, generator)
    own = ours[:, 0], theirs[:, 0]
    right, wrong = (crd(*(side.roll(shift, 0) for side in own[::-1]), ours, theirs, ROWS) for shift in (0, 1))
    assert right < wrong


def test_the_objective_is_finite_in_float32_at_a_low_temperature(memory, batch, generator):
    rows, student, teacher = batch
    candidates = (side.float() for side in memory.candidates(rows, NEGATIVES, generator))
    student = student.float().requires_grad_()
    loss = crd(student, teacher.float(), *candidates, ROWS, temperature=0.001)
    assert loss.isfinite()
    gradient = torch.autograd.grad(loss, student)[0]
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_the_gradient_is_the_numeric_one(memory, batch, generator):
    rows, student, teacher = batch
    candidates = memory.candidates(rows, NEGATIVES, generator)
    both = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: crd(s, t, *candidates, ROWS, constants=(3.0, 0.5)), both)


def test_negatives_have_another_label_and_are_drawn_evenly():
    labels = torch.tensor([1, 0, 7, 1, 0, 7, 7, 1])
    memory = Memory.random(labels, 2, torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 1, 2])
    draws = 20_000
    chosen = memory.others(rows, draws, torch.Generator().manual_seed(1))
    for row, others in zip(rows, chosen, strict=True):
        counts = torch.bincount(others, minlength=8)
        allowed = labels != labels[row]
        assert (counts > 0).equal(allowed)
        even = draws / allowed.sum()
        assert (counts[allowed] - even).abs().max() < 5 * even**0.5
    assert chosen.equal(memory.others(rows, draws, torch.Generator().manual_seed(1)))
    assert not chosen.equal(memory.others(rows, draws, torch.Generator().manual_seed(2)))
    ours, theirs = memory.candidates(rows, draws, torch.Generator().manual_seed(1))
    assert ours.equal(memory.student[torch.cat([rows[:, None], chosen], 1)])
    assert theirs.equal(memory.teacher[torch.cat([rows[:, None], chosen], 1)])


def test_negatives_need_a_second_label(generator):
    memory = Memory.random(torch.zeros(4, dtype=torch.long), 2, generator)
    with pytest.raises(ValueError, match="second label"):
        memory.others(torch.tensor([0]), 1, generator)


def test_memory_holds_directions_without_a_graph(memory, batch):
    rows, student, teacher = batch
    before = memory.student.clone(), memory.teacher.clone()
    memory.update(rows, student.requires_grad_(), teacher, momentum=0.9)
    for held, old, new in zip((memory.student, memory.teacher), before, (student, teacher), strict=True):
        assert not held.requires_grad
        assert held.norm(dim=1).allclose(torch.ones(ROWS, dtype=torch.float64))
        assert held[rows].allclose(unit(0.9 * old[rows] + 0.1 * new.detach()))
        kept = torch.ones(ROWS, dtype=torch.bool).index_fill(0, rows, False)
        assert held[kept].equal(old[kept])
