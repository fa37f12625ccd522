"""Soft labels: what survived mutation testing, held by values from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fedkd.core.soft_labels import certainty, normalized, probabilities, weighted_sum

LOGITS = torch.tensor([[[0.0, math.log(4.0)], [math.log(9.0), 0.0]]])  # one client, two samples, two classes


def test_probabilities_are_the_softmax_of_logits_over_the_temperature():
    assert probabilities(LOGITS)[0].tolist() == [pytest.approx([0.2, 0.8]), pytest.approx([0.9, 0.1])]
    assert probabilities(LOGITS, 2.0)[0].tolist() == [pytest.approx([1 / 3, 2 / 3]), pytest.approx([0.75, 0.25])]
    assert probabilities(LOGITS.double()).dtype == torch.float32


def test_certainty_weighs_by_the_exponential_of_minus_the_entropy():
    logits = torch.tensor([[[0.0, 0.0]], [[1000.0, 0.0]]])  # entropies log 2 and 0
    equal = torch.ones(2, 1)
    assert certainty(logits, equal)[:, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert certainty(logits, equal, 3.0)[:, 0].tolist() == pytest.approx([1 / 9, 8 / 9])


def test_normalized_weights_are_uniform_where_all_are_zero():
    weights = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    shares = normalized(weights, torch.zeros(2, 2, 5))
    assert shares.tolist() == [[0.25, 0.5], [0.75, 0.5]]
    assert shares.dtype == torch.float64


@pytest.mark.parametrize("weights", [2, 4])
def test_a_weight_for_every_client_or_none(weights):
    with pytest.raises(ValueError, match="zip"):
        weighted_sum(torch.ones(3, 1, 2), torch.ones(weights, 1, 1))
