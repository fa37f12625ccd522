"""The laws that hold for every aggregator, published values, and slow per-sample oracles."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.algorithms import aggregators
from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import UsageError

NAMES = sorted(CATALOG["aggregator"])
SHARPENING = {"era", "beta-era", "vote"}  # they change the probabilities even of equal clients


def draw(seed: int, clients: int = 4, samples: int = 6, classes: int = 5, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(clients, samples, classes, generator=generator), torch.rand(
        clients, 1, generator=generator
    ) + 0.1


def sure(*votes: int, classes: int):
    """Logits [K, 1, C] of clients that are certain."""
    return 1000.0 * torch.eye(classes)[list(votes)][:, None]


def aggregate(text, logits, weights):
    return specs.bind("aggregator", text)(logits, weights)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.0, 200.0) | st.just(1e4),
    clients=st.integers(1, 7),
    mask=st.booleans(),
)
def test_rows_lie_on_the_simplex(name, seed, scale, clients, mask):
    logits, weights = draw(seed, clients, scale=scale)
    if mask:  # some samples have no client with a positive weight
        weights = (torch.rand(clients, 6, generator=torch.Generator().manual_seed(seed)) > 0.7).float()
    probs = aggregate(name, logits, weights)
    assert probs.shape == logits.shape[1:]
    assert probs.dtype == logits.dtype
    assert (probs >= 0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(len(probs[..., 0])), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("certain", [False, True])  # certain clients have bitwise equal probabilities, and tie
def test_the_order_of_clients_does_not_matter(name, certain):
    for seed in range(5):
        logits, weights = draw(seed, clients=11, samples=20, classes=3, scale=1e4 if certain else 3.0)
        weights = torch.ones_like(weights) if certain else weights
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        probs = aggregate(name, logits, weights)
        assert torch.allclose(probs, aggregate(name, logits[order], weights[order]), atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SHARPENING])
def test_equal_clients_give_their_probabilities(name):
    logits, _ = draw(2, clients=1)
    alike = logits.expand(5, -1, -1)
    assert torch.allclose(aggregate(name, alike, torch.ones(5, 1)), logits[0].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_of_weight_zero_has_no_influence(name):
    logits, weights = draw(3, clients=12)
    weights[[1, 8]] = 0
    kept = weights[:, 0] > 0
    probs = aggregate(name, logits, weights)
    assert torch.allclose(probs, aggregate(name, logits[kept], weights[kept]), atol=1e-6)
    assert not torch.allclose(probs, aggregate(name, logits, weights.clamp_min(0.5)), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_if_all_weights_are_zero_clients_have_equal_weights(name):
    logits, weights = draw(5, clients=7)
    partly = weights.repeat(1, 6)
    partly[:, 3] = 0
    probs = aggregate(name, logits, partly)
    assert torch.allclose(probs[3], aggregate(name, logits, torch.ones(7, 1))[3], atol=1e-6)
    others = torch.arange(6) != 3
    assert torch.allclose(probs[others], aggregate(name, logits, weights)[others], atol=1e-6)


def softmax(row):
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / math.fsum(powers) for p in powers]


def mean(rows, shares):
    return [math.fsum(s * r[c] for s, r in zip(shares, rows, strict=True)) / sum(shares) for c in range(len(rows[0]))]


def trimmed(values, weights, fraction):
    """Remove a fraction of all weight from the smallest values, and from the largest."""
    left = [[v, w] for v, w in sorted(zip(values, weights, strict=True))]
    for side in (left, left[::-1]):
        cut = fraction * sum(weights)
        for pair in side:
            eaten = min(cut, pair[1])
            pair[1] -= eaten
            cut -= eaten
    return sum(v * w for v, w in left) / sum(w for _, w in left)


def weighted_median(values, weights):
    """Halfway between the least value with half the weight at or below it, and the mirror image."""
    below = [v for v in values if sum(w for u, w in zip(values, weights, strict=True) if u <= v) >= sum(weights) / 2]
    above = [v for v in values if sum(w for u, w in zip(values, weights, strict=True) if u >= v) >= sum(weights) / 2]
    return (min(below) + max(above)) / 2


def least_distance(probs, weights):
    """The geometric median by SciPy's minimizer."""
    points, weights = np.array(probs), np.array(weights) / sum(weights)
    found = scipy.optimize.minimize(
        lambda z: weights @ np.linalg.norm(points - z, axis=1),
        weights @ points,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 10**5, "maxfev": 10**5, "adaptive": True},
    )
    return found.x.tolist()


def filtered(probs, weights, fraction, variance):
    """Cronus' filter for one image, and how many it dropped."""
    kept = [k for k, weight in enumerate(weights) if weight > 0]
    most = math.floor(fraction * len(kept) + 1e-9)
    for dropped in range(most + 1):
        points, shares = np.array(probs)[kept], np.array(weights)[kept]
        center = np.average(points, axis=0, weights=shares)
        values, axes = np.linalg.eigh(np.cov(points.T, aweights=shares, ddof=0))
        if values[-1] <= variance or dropped == most:
            return center.tolist(), dropped
        kept.pop(int(np.argmax(((points - center) @ axes[:, -1]) ** 2)))
    raise AssertionError


def renormalized(row):
    return [v / sum(row) for v in row]


def per_sample(name, rows, weights):
    """The teacher of one image from each client's logits, written from the papers."""
    probs = [softmax(r) for r in rows]
    columns = list(zip(*probs, strict=True))
    spreads = [statistics.pvariance(r) for r in rows]
    certain = [math.exp(sum(p * math.log(p) for p in ps)) for ps in probs]
    votes = [[float(c == r.index(max(r))) for c in range(len(r))] for r in rows]
    return {
        "mean-logits": lambda: softmax(mean(rows, weights)),
        "mean-probs": lambda: mean(probs, weights),
        "era": lambda: softmax([p / 0.1 for p in mean(probs, weights)]),
        "beta-era": lambda: renormalized([p**2 for p in mean(probs, weights)]),
        "entropy": lambda: mean(probs, [w * s for w, s in zip(weights, certain, strict=True)]),
        "variance": lambda: softmax(mean(rows, [w * s for w, s in zip(weights, spreads, strict=True)])),
        "median": lambda: renormalized([weighted_median(values, weights) for values in columns]),
        "trimmed-mean": lambda: renormalized([trimmed(values, weights, 0.2) for values in columns]),
        "geometric-median": lambda: least_distance(probs, weights),
        "spectral": lambda: filtered(probs, weights, 0.2, 0.05)[0],
        "vote": lambda: mean(votes, weights),
    }[name]()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clients", [4, 11])
def test_against_a_loop_over_samples(name, clients):
    logits, weights = draw(4, clients)
    weights = weights * torch.rand(clients, 6, generator=torch.Generator().manual_seed(1))
    weights[0, 0] = 0  # no influence on the first sample
    far = name == "geometric-median"  # it converges slowly near a client's vector, and its oracle is less exact
    probs = aggregate(f"{name}:steps=3000" if far else name, logits, weights)
    for sample in range(logits.shape[1]):
        expected = per_sample(name, logits[:, sample].tolist(), weights[:, sample].tolist())
        assert probs[sample].tolist() == pytest.approx(expected, abs=1e-4 if far else 1e-6)


def test_the_usual_number_of_steps_comes_near_the_geometric_median():
    logits, weights = draw(4, 11, samples=50)
    probs, shares = logits.double().softmax(-1), (weights / weights.sum())[:, 0].double()

    def distance(steps):
        center = aggregate(f"geometric-median{steps}", logits, weights).double()
        return torch.einsum("k,kn->n", shares, (probs - center).norm(dim=-1))

    assert (distance("") - distance(":steps=3000")).max() < 1e-4
    assert (distance(":steps=3") - distance("")).max() > 1e-3


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
    probs = aggregators.era(torch.tensor(mean).clamp_min(1e-30).log().view(1, 1, -1), torch.ones(1, 1))[0]
    for place, value in expected.items():
        assert probs[place].item() == pytest.approx(value, abs=6e-5)


def test_published_values_of_enhanced_entropy_reduction():
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    one = torch.ones(1, 1)
    assert aggregators.beta_era(logits, one)[0].tolist() == pytest.approx([0.658, 0.237, 0.105], abs=5e-4)
    assert aggregators.beta_era(logits, one, beta=1.0)[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert aggregators.beta_era(logits, one, beta=1e6)[0].tolist() == [1, 0, 0]


def test_one_overconfident_client_dominates_mean_logits_but_not_mean_probabilities():
    logits = torch.zeros(10, 1, 2)
    logits[:9, 0, 0] = 2.0
    logits[9, 0, 1] = 100.0
    equal = torch.ones(10, 1)
    assert aggregators.mean_logits(logits, equal)[0].argmax() == 1
    assert aggregators.mean_probs(logits, equal)[0].argmax() == 0


def test_a_very_large_sharpness_selects_the_most_certain_client():
    logits, weights = draw(6)
    surest = torch.special.entr(logits.softmax(-1)).sum(-1).argmin(0)
    probs = aggregators.entropy(logits, weights, sharpness=1e7)
    assert torch.allclose(probs, logits[surest, torch.arange(6)].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("clients", range(1, 9))
@pytest.mark.parametrize("scale", [3.0, 20.0])  # clients rarely agree: medians down to 1e-6
def test_the_median_of_equal_weights_is_the_usual_one(clients, scale):
    logits, _ = draw(7, clients, scale=scale)
    columns = logits.double().softmax(-1).permute(1, 2, 0).tolist()
    expected = torch.tensor([renormalized([statistics.median(values) for values in row]) for row in columns])
    assert torch.allclose(aggregators.median(logits, torch.ones(clients, 1)), expected, atol=1e-6)


def test_the_trimmed_mean_of_equal_weights_is_the_usual_one():
    logits, weights = draw(8, 10)
    inner = logits.double().softmax(-1).sort(0).values[3:7].mean(0)
    probs = aggregators.trimmed_mean(logits, torch.ones(10, 1), fraction=0.3)
    assert torch.allclose(probs, (inner / inner.sum(-1, keepdim=True)).float(), atol=1e-6)
    whole = aggregators.trimmed_mean(logits, weights, fraction=0.0)
    assert torch.allclose(whole, aggregators.mean_probs(logits, weights), atol=1e-6)
    with pytest.raises(UsageError, match=r"less than 0\.5"):
        specs.bind("aggregator", "trimmed-mean:fraction=0.5")


@pytest.mark.parametrize("floor", [0.0, 1e-30])  # the smallest probability that a client can send
@pytest.mark.parametrize(("name", "clients"), [("median", 3), ("trimmed-mean", 5)])
def test_if_every_class_has_zero_left_the_result_is_the_mean(name, clients, floor):
    logits = torch.eye(clients)[:, None].clamp_min(floor).log().clamp_min(-1e4)
    logits = logits + (logits < 0) * torch.arange(clients)  # what is almost nothing is not the same for all classes
    assert aggregate(name, logits, torch.ones(clients, 1))[0].tolist() == pytest.approx([1 / clients] * clients)


def test_a_client_with_tied_classes_divides_its_weight():
    logits = torch.tensor([[[2.0, 2.0, 1.0]], [[0.0, 1.0, 0.5]]])
    assert aggregators.vote(logits, torch.tensor([[3.0], [1.0]]))[0].tolist() == [0.375, 0.625, 0.0]


@pytest.mark.parametrize(("classes", "variance"), [(5, 0.13), (30, 0.05)])  # fewer, and more, than clients
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.45])
def test_the_spectral_filter_against_a_loop(classes, variance, fraction):
    logits = draw(9, 20, 12, classes)[0] * torch.linspace(0.2, 2.0, 12)[:, None]
    weights = torch.rand(20, 12, generator=torch.Generator().manual_seed(2))
    weights[:5, :3] = 0
    probs = aggregators.spectral(logits, weights, fraction=fraction, variance=variance)
    drops = set()
    for sample in range(12):
        rows = [softmax(row) for row in logits[:, sample].tolist()]
        expected, dropped = filtered(rows, weights[:, sample].tolist(), fraction, variance)
        assert probs[sample].tolist() == pytest.approx(expected, abs=1e-6)
        drops.add(dropped)
    assert {0, math.floor(20 * fraction)} <= drops  # some stopped by the variance, some by the fraction


def test_equally_far_clients_are_dropped_alike():
    equal = torch.ones(5, 1)
    one_drop_for_two = aggregators.spectral(sure(0, 0, 0, 1, 2, classes=3), equal)[0]
    assert one_drop_for_two.tolist() == pytest.approx([3 / 4, 1 / 8, 1 / 8])
    three_equal_sides = aggregators.spectral(sure(0, 0, 1, 1, 2, 2, classes=3), torch.ones(6, 1))[0]
    assert three_equal_sides.tolist() == pytest.approx([1 / 3] * 3)
    votes = sure(*[0] * 71, *[1] * 29, classes=3)  # and 0.29 * 100 is less than 29 in floating point
    assert aggregators.spectral(votes, torch.ones(100, 1), fraction=0.29)[0].tolist() == [1, 0, 0]


def test_if_no_client_may_be_dropped_the_spectral_filter_is_the_mean():
    logits, weights = draw(10, 4)
    assert torch.equal(aggregators.spectral(logits, weights), aggregators.mean_probs(logits, weights))


@pytest.mark.parametrize("name", ["median", "trimmed-mean:fraction=0.3", "geometric-median", "spectral"])
def test_six_malicious_clients_of_twenty_do_not_change_the_predictions(name):
    generator = torch.Generator().manual_seed(11)
    truth = torch.randint(10, (50,), generator=generator)
    lie = torch.eye(10)[(truth + 1) % 10]
    logits = 2.3 * torch.eye(10)[truth] + lie + 0.3 * torch.randn(20, 50, 10, generator=generator)
    logits[:6] = 100 * lie
    assert (aggregators.mean_probs(logits, torch.ones(20, 1)).argmax(-1) != truth).all()
    assert (aggregate(name, logits, torch.ones(20, 1)).argmax(-1) == truth).all()


def test_leave_one_out_against_a_loop():
    logits, weights = draw(12)
    weights = weights.repeat(1, 6)
    weights[:, 2] = 0
    weights[1:, 3] = 0  # only the first client has a weight, so there are no others for it
    probs = aggregators.leave_one_out(logits, weights)
    assert probs.shape == logits.shape
    for client in range(4):
        others = [k for k in range(4) if k != client]
        expected = aggregators.mean_probs(logits[others], weights[others])
        if client == 0:
            expected[3] = logits[0, 3].softmax(-1)
        assert torch.allclose(probs[client], expected, atol=1e-6)
    assert torch.allclose(aggregators.leave_one_out(logits[:1], weights[:1]), logits[:1].softmax(-1))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 0, 4, 2, 3]])
def test_two_groups_are_separated_in_any_order(order):
    group = torch.tensor([0, 1, 0, 1, 1])[order]
    logits = draw(13, 2)[0][group] + 0.1 * draw(14, 5)[0][order]
    probs = logits.softmax(-1)
    centroids, assignment = aggregators.clustered(probs, 2, seed=2**40)
    assert assignment.dtype == torch.int64
    assert assignment.tolist() == (group != group[0]).long().tolist()  # the first client is in cluster 0
    for cluster in range(2):
        assert torch.allclose(centroids[cluster], probs[assignment == cluster].mean(0), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_the_best_of_all_partitions(seed):
    probs = draw(15 + seed, 7)[0].softmax(-1)

    def within(split):
        sides = [probs[[k for k in range(7) if (k in split) is inside]] for inside in (True, False)]
        return sum(((side - side.mean(0)) ** 2).sum().item() for side in sides)

    splits = [set(s) for size in range(1, 7) for s in itertools.combinations(range(7), size) if 0 in s]
    _, assignment = aggregators.clustered(probs, 2, seed)
    assert {k for k in range(7) if assignment[k] == 0} == min(splits, key=within)


def test_clusters_do_not_depend_on_the_order_of_clients():
    probs = draw(18, 30)[0].softmax(-1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    _, here = aggregators.clustered(probs, 4, 0)
    _, there = aggregators.clustered(probs[order], 4, 0)
    assert torch.equal(here[order][:, None] == here[order], there[:, None] == there)


@pytest.mark.parametrize("seed", range(3))
def test_each_client_is_nearest_to_the_centroid_of_its_cluster(seed):
    """If the fifty equal clients counted as one, the client at 0.55 would be in the wrong cluster."""
    line = torch.tensor([0.0] * 50 + [0.3, 0.32, 0.34, 0.36, 0.55, 1.0])[:, None, None]
    probs = torch.cat([line, 1 - line], -1)
    centroids, assignment = aggregators.clustered(probs, 2, seed)
    assert torch.equal((probs[:, None] - centroids).square().sum((2, 3)).argmin(1), assignment)


def test_there_are_at_most_as_many_clusters_as_different_soft_labels():
    probs = draw(19, 2)[0].softmax(-1)
    centroids, assignment = aggregators.clustered(probs[[1, 0, 1]], 3, 0)
    assert assignment.tolist() == [0, 1, 0]
    assert torch.allclose(centroids, probs[[1, 0]])


def test_mixtures_are_sums_over_clients():
    probs, coefficients = draw(20, 3)[0].softmax(-1), torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    mixtures = aggregators.mixed(probs, coefficients)
    assert mixtures.shape == (2, 6, 5)
    for j, sample, c in itertools.product(range(2), range(6), range(5)):
        expected = sum(coefficients[j, k] * probs[k, sample, c] for k in range(3))
        assert mixtures[j, sample, c].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("penalty", "clients", "apart"), [(1e-3, 20, 9.0), (0.02, 8, 0.0), (1.0, 8, 0.0)])
def test_coefficients_meet_the_conditions_of_a_minimum(penalty, clients, apart):
    """On the simplex, and no coordinate that is used has a larger derivative than any other."""
    groups_of_two = (
        apart * torch.eye(5)[torch.arange(clients) % 2][:, None]
    )  # the two groups differ strongly: slow to solve
    probs = (draw(21, clients)[0] + groups_of_two).double().softmax(-1)
    coefficients = aggregators.mixing(probs, penalty=penalty)
    assert torch.allclose(coefficients.sum(1), torch.ones(clients, dtype=torch.float64))
    assert (coefficients >= 0).all()
    free = coefficients.clone().requires_grad_()
    mixtures = torch.einsum("nm,msc->nsc", free, probs)
    loss = ((mixtures - probs) ** 2).sum() / 6 + penalty * ((free - 1 / clients) ** 2).sum()
    (slope,) = torch.autograd.grad(loss, free)
    least = slope.amin(1, keepdim=True)
    assert ((slope - least)[coefficients > 0] < 1e-9).all()
    assert (coefficients > 0).all() == (penalty == 1.0)  # the bounds are met where it is small


def test_the_coefficients_of_two_clients():
    """Each gives the other penalty / (d^2 + 2 penalty), d^2 the mean squared distance of their soft labels."""
    probs = draw(22, 2)[0].double().softmax(-1)
    distance = ((probs[0] - probs[1]) ** 2).sum(-1).mean().item()
    other = 0.1 / (distance + 0.2)
    expected = torch.tensor([[1 - other, other], [other, 1 - other]], dtype=torch.float64)
    assert torch.allclose(aggregators.mixing(probs, penalty=0.1), expected, atol=1e-12)


def test_a_very_large_penalty_and_no_penalty():
    probs = draw(23, 6)[0].softmax(-1)
    assert torch.allclose(aggregators.mixing(probs, penalty=1e9), torch.full((6, 6), 1 / 6, dtype=torch.float64))
    assert torch.allclose(aggregators.mixed(probs, aggregators.mixing(probs, penalty=0.0)), probs)
    alike = aggregators.mixing(probs[:1].repeat(3, 1, 1), penalty=0.1)
    assert torch.allclose(alike, torch.full((3, 3), 1 / 3, dtype=torch.float64))
