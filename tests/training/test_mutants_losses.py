"""Losses: what survived mutation testing, held by values from the formulas."""

from __future__ import annotations

import pytest
import torch

from fedkd.training.losses import contrastive, logits, output_relations, relations
from fedkd.training.losses.graph import graph


@pytest.fixture
def pair(generator):
    student = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    return student, torch.randn(6, 10, generator=generator, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (logits.dist, {"inter": 1.0, "intra": 1.0}),
        (logits.standardized, {"temperature": 2.0}),
        (output_relations.rkd, {"distance": 25.0, "angle": 50.0, "weight": 0.01, "kl": 1.0}),
        (output_relations.similarity, {"weight": 30.0, "kl": 1.0}),
        (output_relations.correlation, {"gamma": 0.4, "order": 2, "weight": 3.0, "kl": 1.0}),
        (output_relations.pkt, {"weight": 300.0, "kl": 1.0}),
    ],
)
def test_defaults_are_the_documented_ones(pair, loss, options):
    assert torch.equal(loss(*pair), loss(*pair, **options))


def test_a_z_score_is_divided_by_the_standard_deviation_with_one_degree_less(pair):
    student, teacher = pair
    scores = [(v - v.mean(-1, keepdim=True)) / v.std(-1, keepdim=True) / 3.0 for v in (student, teacher.log())]
    expected = 9.0 * torch.nn.functional.kl_div(scores[0].log_softmax(-1), scores[1].softmax(-1), reduction="batchmean")
    assert torch.allclose(logits.standardized(student, teacher, temperature=3.0), expected)


def test_distances_count_in_units_of_their_mean(generator):
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    expected = relations.rkd(student, teacher)
    assert torch.allclose(relations.rkd(1e-2 * student, teacher), expected)
    assert torch.allclose(relations.rkd(student, 1e2 * teacher), expected)


STUDENT = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)  # squared distances 1, 4, 9
TEACHER = torch.tensor([[0.0], [2.0], [3.0]], dtype=torch.float64)  # 4, 1, 9
MEAN = 14 / 3
EDGE = 2 * (3**2 + 3**2) / MEAN**2 / 9


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_edges_are_squared_distances_in_units_of_their_mean(scale, moved):
    sides = [[scale * (features + moved)] for features in (STUDENT, TEACHER)]
    assert graph(*sides, vertex=0.0).item() == pytest.approx(EDGE)


def test_small_distances_of_images_far_away_are_no_noise():
    sides = [[1.0 + 1e-8 * features] for features in (STUDENT, TEACHER)]
    assert graph(*sides, vertex=0.0).item() == pytest.approx(EDGE, rel=1e-4)


def test_small_features_in_single_precision_are_no_noise():
    sides = [[1e-4 * features.float()] for features in (STUDENT, TEACHER)]
    assert graph(*sides, vertex=0.0).item() == pytest.approx(EDGE, rel=1e-4)


def test_images_that_coincide_have_no_edges():
    alone = graph([torch.ones_like(STUDENT)], [TEACHER], vertex=0.0).item()
    assert alone == pytest.approx(2 * (4**2 + 1**2 + 9**2) / MEAN**2 / 9)


def test_edges_move_from_layer_to_layer():
    still, moving = [STUDENT, STUDENT], [STUDENT, TEACHER]
    value = graph(moving, still, vertex=0.0, edge=0.0, vertex_move=0.0, edge_move=1.0).item()
    assert value == pytest.approx(EDGE**2)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e2])
def test_moves_are_squared_distances_in_units_of_their_mean(scale):
    start = torch.zeros(2, 1, dtype=torch.float64)
    one = [start, scale * torch.tensor([[1.0], [3.0]], dtype=torch.float64)]  # squares 1 and 9: 0.2 and 1.8
    two = [start, torch.tensor([[1.0], [1.0]], dtype=torch.float64)]
    still = [start, start]
    options = {"vertex": 0.0, "edge": 0.0}
    assert graph(one, two, **options).item() == pytest.approx(0.8**2)
    assert graph(one, still, **options).item() == pytest.approx((0.2**2 + 1.8**2) / 2)


def test_normalizers_are_those_of_the_default_temperature(generator):
    sides = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    candidates = [torch.randn(4, 5, 3, generator=generator) for _ in range(2)]
    usual = contrastive.normalizers(*sides, *candidates, 64)
    assert usual == contrastive.normalizers(*sides, *candidates, 64, temperature=0.07)


def test_negatives_are_drawn_in_double_precision_one_by_one():
    labels = torch.tensor([1, 0, 2, 1, 0])
    memory = contrastive.Memory(torch.zeros(5, 2), torch.zeros(5, 2), labels)
    rows = torch.tensor([0, 1, 2])
    found = memory.others(rows, 4, torch.Generator().manual_seed(9))
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    in_order = [1, 4, 0, 3, 2]  # by label, then by row
    for row, places, drawn in zip(rows.tolist(), found.tolist(), draws.tolist(), strict=True):
        others = [other for other in in_order if labels[other] != labels[row]]
        assert places == [others[int(u * len(others))] for u in drawn]


def test_without_a_second_label_there_are_no_negatives(generator):
    memory = contrastive.Memory(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"^[a-z].*label"):
        memory.others(torch.tensor([0]), 1, generator)
