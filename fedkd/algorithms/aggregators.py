"""Aggregators: the probabilities of the ensemble from the clients' logits.

Shapes: logits [K, N, C] of K clients, already divided by the temperature; weights broadcastable to
[K, N], not negative. An aggregator returns probs [N, C] whose rows sum to one. If all weights of a
sample are zero, all clients have the same weight. Sums over clients run in float64 and in client order.

`leave_one_out`, `clustered`, and `mixed` with the coefficients [K, K] of `mixing` give a teacher for
one client or one group of clients. They are not aggregators and not in the catalog.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import PluginError
from fedkd.core.soft_labels import certainty, normalized, weighted_mean, weighted_sum
from fedkd.core.soft_labels import mean_probs as mean_probs

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.algorithms.base import Aggregator

Scale = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Bound = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=0.5)]
TOLERANCE = 1e-3  # of sums of probabilities of a user-defined aggregator; float16 rounds them by up to 5e-4


def named(text: str) -> Aggregator:
    """The aggregator that a spec names; what a user-defined one returns is checked.

    Raises:
        UsageError, PluginError: as `specs.bind`.

    """
    bound = specs.bind("aggregator", text)
    return bound if specs.parse(text).name in CATALOG["aggregator"] else partial(_checked, text, bound)


def _checked(text: str, aggregator: Aggregator, logits: Tensor, weights: Tensor) -> Tensor:
    """What it returns, if these are probs [N, C].

    Raises:
        PluginError: they are not.

    """
    import torch

    probs = aggregator(logits, weights)
    expected = list(logits.shape[1:])
    if not isinstance(probs, torch.Tensor) or list(probs.shape) != expected:
        what = list(probs.shape) if isinstance(probs, torch.Tensor) else type(probs).__name__
        raise PluginError(f"--aggregator {text} returned {what}; it must return a tensor {expected} of probabilities.")
    if not probs.isfinite().all():
        raise PluginError(f"--aggregator {text} returned numbers that are not finite; it must return probabilities.")
    if probs.min() < -TOLERANCE:
        raise PluginError(f"--aggregator {text} returned {probs.min():.3g}; probabilities are not negative.")
    sums = probs.double().sum(-1)
    if (sums - 1).abs().max() > TOLERANCE:
        worst = sums[(sums - 1).abs().argmax()]
        raise PluginError(
            f"--aggregator {text} returned a row that sums to {worst:.4g}; each row must be probabilities that sum to "
            "1 (end it with softmax, or divide by the sum)."
        )
    return probs


def mean_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """softmax(sum_k w_k f_k) (FedDF: Lin et al., 2020). One overconfident client can outweigh the rest."""
    return weighted_mean(logits, weights).softmax(-1).to(logits.dtype)


def era(logits: Tensor, weights: Tensor, *, temperature: Scale = 0.1) -> Tensor:
    """Entropy reduction: softmax(p / T) of the mean *probabilities* p (DS-FL: Itahara et al., 2020).

    Likely classes become more likely; classes of probability zero get a small positive one.
    """
    return (weighted_mean(_probs(logits), weights) / temperature).softmax(-1).to(logits.dtype)


def beta_era(logits: Tensor, weights: Tensor, *, beta: Scale = 2.0) -> Tensor:
    """p^beta / sum_c p^beta of the mean probabilities p; no change for beta 1 (SCARLET: Azuma et al., 2025)."""
    return (beta * weighted_mean(_probs(logits), weights).log()).softmax(-1).to(logits.dtype)


def entropy(logits: Tensor, weights: Tensor, *, sharpness: Scale = 1.0) -> Tensor:
    """Mean of probabilities, each client weighted for each sample by exp(-sharpness * H(p_k)).

    Certain clients have more weight (the unlabeled analogue of FedGEMS: Cheng et al., 2021).
    """
    certain = certainty(logits, weights, sharpness)
    return weighted_mean(_probs(logits), certain).to(logits.dtype)


def variance(logits: Tensor, weights: Tensor) -> Tensor:
    """softmax(sum_k a_k f_k), a_k(x) = Var_c f_k / sum Var: Fed-ET's weights (Cho et al., 2022)."""
    spread = logits.double().var(-1, correction=0)
    return weighted_mean(logits, normalized(weights, logits) * (spread + 1e-12)).softmax(-1).to(logits.dtype)


def median(logits: Tensor, weights: Tensor) -> Tensor:
    """The clients' median probability of each class (Yin et al., 2018), renormalized.

    The limit of the trimmed mean: halfway between the lower and the upper weighted median.
    """
    return _middle(logits, weights, 0.5 - 1e-6)


def trimmed_mean(logits: Tensor, weights: Tensor, *, fraction: Fraction = 0.2) -> Tensor:
    """Each class' mean without ``fraction`` of the weight at either end (Yin et al., 2018), renormalized."""
    return _middle(logits, weights, fraction)


def geometric_median(logits: Tensor, weights: Tensor, *, steps: PositiveInt = 100) -> Tensor:
    """argmin_z sum_k w_k ||p_k - z|| of the vectors p_k (RFA: Pillutla et al., 2022).

    Weiszfeld's algorithm, from the mean: each step is the mean with weights w_k / max(1e-6, ||p_k - z||).
    """
    probs, shares = _probs(logits), normalized(weights, logits)
    center = weighted_mean(probs, shares)
    for _ in range(steps):
        center = weighted_mean(probs, shares / (probs - center).norm(dim=-1).clamp_min(1e-6))
    return center.to(logits.dtype)


def spectral(logits: Tensor, weights: Tensor, *, fraction: Fraction = 0.2, variance: Bound = 0.05) -> Tensor:
    """Cronus' robust mean of probabilities (Chang et al., 2019, after Diakonikolas et al., 2017).

    While the covariance of a sample's vectors has an eigenvalue above ``variance``, the client that lies
    farthest along its eigenvector is dropped; at most floor(``fraction`` * K) of the K clients with a positive
    weight. Equally far clients are dropped together; if they are more than may still be dropped, each loses
    an equal part of its weight. The paper states no constants. Malicious clients with a share e of the weight
    that stay within ``variance`` = v move the mean by at most sqrt(v e / (1 - e)): by 0.11 for a fifth of the
    clients and 0.05, the default.
    """
    probs, shares = _probs(logits), normalized(weights, logits)
    kept = (shares > 0).double()
    budget = (fraction * kept.sum(0) + 1e-9).floor()  # how many clients may still be dropped for each sample
    indices = budget.nonzero()[:, 0]
    while len(indices):
        eigenvalue, distances = _principal_axis(probs[:, indices], (shares * kept)[:, indices])
        exceeds = eigenvalue > variance
        indices, distances = indices[exceeds], distances[:, exceeds].masked_fill(kept[:, indices[exceeds]] == 0, -1)
        farthest = (distances >= distances.amax(0) * (1 - 1e-6)).double()
        dropped = (budget[indices] / farthest.sum(0)).clamp_max(1)
        kept[:, indices] -= farthest * dropped
        budget[indices] = (budget[indices] - farthest.sum(0)).clamp_min(0)
        indices = indices[budget[indices] > 0]
    return weighted_mean(probs, shares * kept).to(logits.dtype)


def vote(logits: Tensor, weights: Tensor) -> Tensor:
    """The weighted share of clients that predict each class (CFD with one bit: Sattler et al., 2020).

    If several classes of a client tie for the largest logit, its weight is divided among them.
    """
    first = (logits == logits.amax(-1, keepdim=True)).double()
    return weighted_mean(first / first.sum(-1, keepdim=True), weights).to(logits.dtype)


def leave_one_out(logits: Tensor, weights: Tensor) -> Tensor:
    """For each client the mean of the *others'* probabilities [K, N, C] (FD: Jeong et al., 2018).

    The client's own probabilities if no other client has any weight: these change nothing.
    """
    probs, shares = _probs(logits), normalized(weights, logits)
    others = 1 - probs.new_ones(len(probs)).diag()
    total = (others @ (shares[..., None] * probs).flatten(1)).view_as(probs)
    weight = (others @ shares)[..., None]
    return (total / weight).where(weight > 0, probs).to(logits.dtype)


def clustered(probs: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """COMET's k-means over the clients' soft labels [K, N, C] (Cho et al., 2022).

    Returns the centroids [k, N, C] and each client's cluster [K] (int64); the first client is in cluster 0.
    Clients with equal soft labels are one point: k is at most the number of different soft labels. The points
    are sorted before k-means is initialized, so the clusters depend on the soft labels and the seed only.
    """
    import torch
    from sklearn.cluster import KMeans

    points, place, multiplicity = torch.unique(
        probs.double().flatten(1), dim=0, return_inverse=True, return_counts=True, sorted=True
    )
    means = KMeans(min(count, len(points)), n_init=10, random_state=seed % 2**32)
    labels = means.fit(points.numpy(), sample_weight=multiplicity.numpy()).labels_[place.numpy()].tolist()
    names = list(dict.fromkeys(labels))
    assignment = torch.tensor([names.index(label) for label in labels])
    groups = [probs[assignment == cluster] for cluster in range(len(names))]
    return torch.stack([weighted_mean(group, torch.ones(1, 1)) for group in groups]).to(probs.dtype), assignment


def mixed(probs: Tensor, coefficients: Tensor) -> Tensor:
    """The mixtures [J, N, C] of probs with coefficients [J, K]: sum_m c_jm p_m (KT-pFL: Zhang et al., 2021)."""
    return (coefficients.double() @ probs.double().flatten(1)).view(-1, *probs.shape[1:]).to(probs.dtype)


def mixing(probs: Tensor, *, penalty: float) -> Tensor:
    """KT-pFL's coefficients [K, K], in float64 (Zhang et al., 2021).

    Row n is the distribution c_n that minimizes, s_m being the soft labels [N, C] of client m,

        ||s_n - sum_m c_nm s_m||^2 / N + penalty * ||c_n - 1/K||^2.

    The authors' code takes a few gradient steps. This solves the problem by Nesterov's accelerated projected
    gradient from c_n = e_n; its value ends at most 3 penalty exp(-2000 sqrt(penalty / (K + penalty))) above
    the minimum.
    """
    import torch

    centered = probs.double().flatten(1)
    centered = centered - centered.mean(0)
    gram = centered @ centered.T / probs.shape[1]
    identity = torch.eye(len(probs), dtype=torch.float64)
    curvature = (torch.linalg.eigvalsh(gram)[-1].clamp_min(0) + penalty).clamp_min(1e-30)
    root = (penalty / curvature).sqrt()
    coefficients = ahead = identity
    for _ in range(2000):
        slope = (ahead - identity) @ gram + penalty * (ahead - 1 / len(probs))
        before, coefficients = coefficients, _onto_simplex(ahead - slope / curvature)
        ahead = coefficients + (1 - root) / (1 + root) * (coefficients - before)
    return coefficients


def _probs(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)


def _middle(logits: Tensor, weights: Tensor, fraction: float) -> Tensor:
    """Each class' mean of the sorted probabilities whose cumulative weight is in [fraction, 1 - fraction].

    Renormalized. The mean over all clients if every class has zero left (three clients certain of three classes).
    """
    probs = _probs(logits)
    values, order = probs.sort(0)
    shares = normalized(weights, probs)[..., None].expand_as(probs).gather(0, order)
    above = shares.cumsum(0)
    inside = (above.clamp_max(1 - fraction) - (above - shares).clamp_min(fraction)).clamp_min(0)
    middle = weighted_sum(values, inside / (1 - 2 * fraction))
    total = middle.sum(-1, keepdim=True)
    return (middle / total).where(total > 1e-9, weighted_mean(probs, weights)).to(logits.dtype)


def _principal_axis(probs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue [N] of each sample's weighted covariance; the clients' distances [K, N] along its axis.

    Distances from the mean are squared, up to a factor of the sample. Axes with equal eigenvalues are taken
    together. Z Z' and Z' Z have the same eigenvalues; the smaller of them is decomposed.
    """
    import torch

    centered = (probs - weighted_mean(probs, weights)).transpose(0, 1)
    scaled = centered * normalized(weights, probs).T.sqrt()[..., None]
    wide = scaled.shape[1] < scaled.shape[2]
    values, axes = torch.linalg.eigh(scaled @ scaled.mT if wide else scaled.mT @ scaled)
    if wide:
        axes = scaled.mT @ axes
    top = values[:, -1:]
    leading = (values >= top * (1 - 1e-6)).double()
    return top[:, 0], ((centered @ axes).square() @ leading[..., None])[..., 0].T


def _onto_simplex(rows: Tensor) -> Tensor:
    """The nearest distributions: max(0, row - t), t = max_j (sum of the j largest - 1) / j (Held et al., 1974)."""
    ordered = rows.sort(-1, descending=True).values
    counts = ordered.new_ones(rows.shape[-1]).cumsum(0)
    return (rows - ((ordered.cumsum(-1) - 1) / counts).amax(-1, keepdim=True)).clamp_min(0)
