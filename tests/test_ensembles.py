"""The laws that hold for every aggregator, published values, and slow per-sample oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd import ensembles, specs
from fedkd.catalog import CATALOG

NAMES = sorted(CATALOG["aggregator"])


def draw(seed: int, clients: int = 4, samples: int = 6, classes: int = 5, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(clients, samples, classes, generator=generator), torch.rand(
        clients, 1, generator=generator
    ) + 0.1


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.0, 200.0), clients=st.integers(1, 7))
def test_rows_lie_on_the_simplex(name, seed, scale, clients):
    logits, weights = draw(seed, clients, scale=scale)
    probs = specs.bind("aggregator", name)(logits, weights)
    assert probs.shape == logits.shape[1:]
    assert probs.dtype == logits.dtype
    assert (probs >= 0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(len(probs[..., 0])), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_clients_does_not_matter(name):
    logits, weights = draw(1)
    order = torch.tensor([2, 0, 3, 1])
    aggregate = specs.bind("aggregator", name)
    assert torch.allclose(aggregate(logits, weights), aggregate(logits[order], weights[order]), atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "era"])  # which sharpens what all agree on
def test_when_all_agree_the_teacher_says_the_same(name):
    logits, _ = draw(2, clients=1)
    alike = logits.expand(5, -1, -1)
    probs = specs.bind("aggregator", name)(alike, torch.ones(5, 1))
    assert torch.allclose(probs, logits[0].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_of_weight_zero_has_no_say(name):
    logits, weights = draw(3)
    weights[1] = 0
    kept = torch.tensor([0, 2, 3])
    aggregate = specs.bind("aggregator", name)
    assert torch.allclose(aggregate(logits, weights), aggregate(logits[kept], weights[kept]), atol=1e-6)


def softmax(row):
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / math.fsum(powers) for p in powers]


def per_sample(name, rows, weights):
    """The teacher of one image from each client's logits, written from the papers."""
    if name in ("mean-probs", "era"):
        shares = weights
        mixed = [
            math.fsum(w * softmax(r)[c] for w, r in zip(shares, rows, strict=True)) / sum(shares)
            for c in range(len(rows[0]))
        ]
        return softmax([p / 0.1 for p in mixed]) if name == "era" else mixed
    if name == "entropy":
        probs = [softmax(r) for r in rows]
        shares = [w * math.exp(sum(p * math.log(p) for p in ps)) for w, ps in zip(weights, probs, strict=True)]
        return [
            math.fsum(s * ps[c] for s, ps in zip(shares, probs, strict=True)) / sum(shares) for c in range(len(rows[0]))
        ]
    shares = weights
    if name == "variance":
        means = [sum(r) / len(r) for r in rows]
        shares = [w * sum((v - m) ** 2 for v in r) / len(r) for w, r, m in zip(weights, rows, means, strict=True)]
    return softmax(
        [math.fsum(s * r[c] for s, r in zip(shares, rows, strict=True)) / sum(shares) for c in range(len(rows[0]))]
    )


@pytest.mark.parametrize("name", NAMES)
def test_against_a_loop_over_samples(name):
    logits, weights = draw(4)
    probs = specs.bind("aggregator", name)(logits, weights)
    for sample in range(logits.shape[1]):
        expected = per_sample(name, logits[:, sample].tolist(), weights[:, 0].tolist())
        assert probs[sample].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ([1.0] + [0.0] * 9, {0: 0.99959}),
        ([0.5, 0.5] + [0.0] * 8, {0: 0.4869, 1: 0.4869, 9: 0.0033}),
        ([0.1] * 10, {0: 0.1, 9: 0.1}),
        ([0.2] + [0.8 / 9] * 9, {0: 0.2524, 5: 0.0831}),
    ],
)
def test_published_values_of_entropy_reduction(mean, expected):
    probs = ensembles.era(torch.tensor(mean).clamp_min(1e-30).log().view(1, 1, -1), torch.ones(1, 1))[0]
    for place, value in expected.items():
        assert probs[place].item() == pytest.approx(value, abs=6e-5)


def test_one_overconfident_client_outvotes_logits_but_not_probabilities():
    logits = torch.zeros(10, 1, 2)
    logits[:9, 0, 0] = 2.0
    logits[9, 0, 1] = 100.0
    equal = torch.ones(10, 1)
    assert ensembles.mean_logits(logits, equal)[0].argmax() == 1
    assert ensembles.mean_probs(logits, equal)[0].argmax() == 0
