"""Aggregators: what survived mutation testing, held by closed forms and limits."""

from __future__ import annotations

import pytest
import torch

from fedkd.algorithms.aggregators import clustered, geometric_median, mixing, spectral


@pytest.mark.parametrize(("distance", "penalty"), [(1e-3, 1e-7), (1.0, 0.5), (0.1, 1e-4)])
def test_two_clients_mix_by_the_closed_form(distance, penalty):
    """t^2 D + 2 penalty (t - 1/2)^2 is least at t = penalty / (D + 2 penalty); D is the squared distance."""
    probs = torch.zeros(2, 1, 2, dtype=torch.float64)
    probs[1, 0, 0] = distance
    other = penalty / (distance**2 + 2 * penalty)
    expected = torch.tensor([[1 - other, other], [other, 1 - other]], dtype=torch.float64)
    assert torch.allclose(mixing(probs, penalty=penalty), expected, atol=1e-8)


def test_seeds_beyond_32_bits_are_seeds():
    probs = torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(clustered(probs, 3, 2**32 + 5)[1], clustered(probs, 3, 5)[1])
    assert torch.equal(clustered(probs, 3, 2**62 + 2**33 + 5)[1], clustered(probs, 3, 5)[1])


def test_the_draw_of_starts_depends_on_the_seed():
    probs = torch.rand(60, 2, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = {tuple(clustered(probs, 12, seed)[1].tolist()) for seed in range(1, 10, 2)}
    assert len(found) > 1


def test_a_variance_at_the_limit_is_none_above_it():
    votes = 1000.0 * torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1]][:, None]
    assert spectral(votes, torch.ones(4, 1), fraction=0.25, variance=0.376)[0].tolist() == [0.75, 0.25]
    assert spectral(votes, torch.ones(4, 1), fraction=0.25, variance=0.374)[0].tolist() == [1.0, 0.0]


def test_the_geometric_median_takes_a_hundred_steps():
    logits = 3 * torch.randn(4, 50, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = torch.rand(4, 50, generator=torch.Generator().manual_seed(5))
    usual = geometric_median(logits, weights)
    assert torch.equal(usual, geometric_median(logits, weights, steps=100))
    assert not torch.equal(usual, geometric_median(logits, weights, steps=101))
