"""Losses on relations and graphs, against torchdistill and against loops written from the papers."""

from __future__ import annotations

from itertools import pairwise
from math import exp, factorial

import numpy as np
import pytest
import torch
from torchdistill.losses import mid_level

from fedkd.training.losses.graph import graph
from fedkd.training.losses.relations import correlation, pkt, rkd, similarity

CLOSE = {"rel": 1e-6, "abs": 1e-12}
PATHS = {"student_output_path": "x", "teacher_output_path": "x"}


@pytest.fixture
def pair(generator):
    """Features of different widths and scales."""
    student = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return student, 3 * torch.randn(7, 2, 3, 2, generator=generator, dtype=torch.float64)


def torchdistill(loss, student, teacher):
    return loss({"x": {"output": student}}, {"x": {"output": teacher}}).item()


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_rkd_is_torchdistills(pair, distance, angle):
    theirs = torchdistill(mid_level.RKDLoss(**PATHS, dist_factor=distance, angle_factor=angle, reduction="mean"), *pair)
    assert rkd(*pair, distance=distance, angle=angle).item() == pytest.approx(theirs, **CLOSE)


def huber(x):
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


def by_hand_rkd(student, teacher):
    """Distances and angles in loops; both are zero for rows that coincide."""
    sides = [side.flatten(1).numpy() for side in (student, teacher)]
    n = len(sides[0])
    scaled, cosines = [], []
    for rows in sides:
        distances = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        scaled.append(distances / (distances.sum() / (n * (n - 1))))
        angles = np.zeros((n, n, n))
        for i, j, k in np.ndindex(n, n, n):
            if distances[i, j] > 0 and distances[i, k] > 0:
                angles[i, j, k] = (rows[j] - rows[i]) @ (rows[k] - rows[i]) / distances[i, j] / distances[i, k]
        cosines.append(angles)
    return [np.mean([huber(x) for x in (two[0] - two[1]).ravel()]) for two in (scaled, cosines)]


def test_rkd_against_the_formula_where_rows_coincide(pair):
    """torchdistill counts such pairs in the mean distance, or not, by rounding."""
    student, teacher = (side.clone() for side in pair)
    student[3] = student[0]
    teacher[5] = teacher[1]
    distance, angle = by_hand_rkd(student, teacher)
    assert rkd(student, teacher, distance=2.0, angle=3.0).item() == pytest.approx(2 * distance + 3 * angle, **CLOSE)


def test_rkd_does_not_depend_on_scale_shift_or_rotation(pair, generator):
    student, teacher = pair
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    assert rkd(3 * student @ rotation + 2, teacher).item() == pytest.approx(rkd(student, teacher).item(), **CLOSE)


def by_hand_similarity(student, teacher, order):
    grams = [side.flatten(1).numpy() @ side.flatten(1).numpy().T for side in (student, teacher)]
    ours, theirs = ([row / np.linalg.norm(row, order) for row in gram] for gram in grams)
    return sum(np.sum((a - b) ** 2) for a, b in zip(ours, theirs, strict=True)) / len(student) ** 2


def test_similarity_against_the_formula(pair):
    assert similarity(*pair).item() == pytest.approx(by_hand_similarity(*pair, order=2), **CLOSE)
    # torchdistill divides rows by the sum of their magnitudes, where the paper has the Euclidean length.
    theirs = torchdistill(mid_level.SPKDLoss(**PATHS, reduction="batchmean"), *pair)
    assert theirs == pytest.approx(by_hand_similarity(*pair, order=1), **CLOSE)


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.5, 3)])
def test_correlation_is_torchdistills_squared(pair, gamma, order):
    loss = mid_level.CCKDLoss(
        student_linear_path="x",
        teacher_linear_path="x",
        kernel_config={"type": "gaussian", "gamma": gamma, "max_p": order},
        reduction="sum",
    )
    # The paper's norm is squared and its series is that of unit vectors; theirs leaves both to the caller.
    units = [side.flatten(1) / side.flatten(1).norm(dim=1, keepdim=True) for side in pair]
    expected = torchdistill(loss, *units) ** 2 / 7**2
    assert correlation(*pair, gamma=gamma, order=order).item() == pytest.approx(expected, **CLOSE)


def test_correlation_tends_to_the_gaussian_kernel(pair):
    rows = [[row / np.linalg.norm(row) for row in side.flatten(1).numpy()] for side in pair]
    kernels = [np.array([[exp(-0.4 * np.sum((a - b) ** 2)) for b in side] for a in side]) for side in rows]
    expected = np.mean((kernels[0] - kernels[1]) ** 2)
    assert correlation(*pair, order=20).item() == pytest.approx(expected, **CLOSE)
    assert 0.8**3 / factorial(3) < 0.1  # so that order 2, the default, is near
    assert correlation(*pair).item() == pytest.approx(expected, rel=0.2)


def test_pkt_is_torchdistills(pair):
    student, teacher = (side.flatten(1) for side in pair)
    loss = mid_level.PKTLoss("x", "output", "x", "output", eps=1e-15)  # its default shows in the sixth digit
    assert pkt(*pair).item() == pytest.approx(torchdistill(loss, student, teacher), **CLOSE)


def test_pkt_is_finite_where_rows_are_opposite():
    """There a probability is zero."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    loss = pkt(rows, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, rows)[0].isfinite().all()


def layers(generator, *widths):
    return [torch.randn(6, width, generator=generator, dtype=torch.float64) for width in widths]


def by_hand_graph(student, teacher, weights):
    """Vertices, edges, moves of vertices, moves of edges: loops over images."""
    sides = [[layer.numpy() for layer in side] for side in (student, teacher)]
    n, depth = len(sides[0][0]), len(sides[0])
    edges, moves, changes = [], [], []
    for side in sides:
        graphs = []
        for layer in side:
            squares = np.array([[np.sum((a - b) ** 2) for b in layer] for a in layer])
            graphs.append(squares / (squares.sum() / (n * (n - 1))))
        edges.append(graphs)
        steps = [np.array([np.sum((a - b) ** 2) for a, b in zip(*two, strict=True)]) for two in pairwise(side)]
        moves.append([step / step.mean() for step in steps])
        changes.append([np.mean((a - b) ** 2) for a, b in pairwise(graphs)])
    terms = [
        np.mean((sides[0][-1] - sides[1][-1]) ** 2),
        np.mean([np.mean((a - b) ** 2) for a, b in zip(*edges, strict=True)]),
        np.mean([np.mean((a - b) ** 2) for a, b in zip(*moves, strict=True)]) if depth > 1 else 0.0,
        np.mean([(a - b) ** 2 for a, b in zip(*changes, strict=True)]) if depth > 1 else 0.0,
    ]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


NAMES = ("vertex", "edge", "vertex_move", "edge_move")


@pytest.mark.parametrize("weights", [*np.eye(4).tolist(), [1.0, 1.0, 1.0, 0.0], [0.1, 5.0, 5.0, 2.0]])
def test_graph_against_the_formula(generator, weights):
    student, teacher = layers(generator, 4, 4, 4), layers(generator, 4, 4, 4)
    ours = graph(student, teacher, **dict(zip(NAMES, weights, strict=True)))
    assert ours.item() == pytest.approx(by_hand_graph(student, teacher, weights), **CLOSE)
    if weights == [1.0, 1.0, 1.0, 0.0]:
        assert graph(student, teacher) == ours


def test_graph_of_one_layer_has_no_moves(generator):
    student, teacher = layers(generator, 4), layers(generator, 4)
    expected = by_hand_graph(student, teacher, [1.0, 1.0, 0.0, 0.0])
    assert graph(student, teacher, edge_move=1.0).item() == pytest.approx(expected, **CLOSE)


def test_graph_accepts_maps_and_its_edges_do_not_depend_on_scale_or_width(generator):
    student, teacher = layers(generator, 8, 4), layers(generator, 3, 9)
    edges = {"vertex": 0.0, "vertex_move": 0.0}
    loss = graph([student[0].view(6, 2, 2, 2), 5 * student[1]], teacher, **edges).item()
    assert loss == pytest.approx(graph(student, teacher, **edges).item(), **CLOSE)


def test_graph_keeps_digits_far_from_zero(generator):
    student, teacher = layers(generator, 4), layers(generator, 4)
    shifted = (100 + student[0]).float()
    exact = graph([shifted.double()], teacher, vertex=0.0).item()
    assert graph([shifted], [teacher[0].float()], vertex=0.0).item() == pytest.approx(exact, rel=1e-5)


def test_graph_treats_rows_that_differ_by_rounding_as_equal(generator):
    """Else their noise would be scaled to mean distance one, and its gradient too."""
    rows = torch.tensor([0.1, 0.7, 1.3, 2.9]).expand(6, 4).clone().requires_grad_()
    noisy = rows * (1 + 1e-7 * torch.tensor([0.0, 1, 2, 0, 1, 2])[:, None])
    teacher = [layer.float() for layer in layers(generator, 4)]
    assert noisy.unique(dim=0).shape[0] > 1
    loss = graph([noisy], teacher, vertex=0.0)
    assert loss == graph([rows], teacher, vertex=0.0)
    assert torch.autograd.grad(loss, rows)[0].eq(0).all()


def test_graph_refuses_layers_that_cannot_be_compared(generator):
    wide, narrow = layers(generator, 4, 4), layers(generator, 4, 3)
    for student, teacher, options in (
        (wide, wide[:1], {}),
        ([], [], {}),
        (wide, narrow, {"vertex_move": 0.0}),
        (narrow, wide, {"vertex": 0.0}),
        (wide, [layer[:1] for layer in wide], {"edge": 0.0}),
    ):
        with pytest.raises(ValueError, match="not"):
            graph(student, teacher, **options)
