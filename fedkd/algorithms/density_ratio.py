"""Density ratio estimation: how much denser a client's images lie at a proxy image than the proxy images do."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fedkd.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


SIDE, COMPONENTS = 8, 32  # images are shrunk to 8x8 before their principal components are taken


def features(reference: Tensor, images: Tensor) -> Tensor:
    """Principal components [N, D] of images [N, H, W, 3] uint8, in the basis of the ``reference`` ones.

    The reference is the proxy set, so all clients have the same basis and the basis reveals no private data.
    """
    center, axes = _basis(reference)
    components: Tensor = (_shrunk(images) - center) @ axes
    return components


def ratio(private: Tensor, proxy: Tensor, at: Tensor) -> Tensor:
    """The estimated p_private / p_proxy [N] at points [N, D], from samples [n, D] and [m, D]; not negative.

    KuLSIF (Kanamori, Suzuki and Sugiyama, 2012) with a Gaussian kernel, whose width is the median distance,
    and regularization l = min(n, m)^-0.9, so that no ratio exceeds 1 / l. The estimate r minimizes
    mean r(proxy)^2 / 2 - mean r(private) + l / 2 ||r||^2.
    """
    n, m = len(private), len(proxy)
    penalty = min(n, m) ** -0.9
    distances = _distances(proxy, proxy)
    width = distances[distances > 0].median() if (distances > 0).any() else distances.new_tensor(1.0)
    among, across = _kernel(proxy, proxy, width), _kernel(proxy, private, width)
    system = among / m + penalty * torch.eye(m, dtype=among.dtype)
    on_proxy = torch.linalg.solve(system, -across.sum(1) / (n * m * penalty))
    estimate = _kernel(at, proxy, width) @ on_proxy + _kernel(at, private, width).sum(1) / (n * penalty)
    clipped: Tensor = estimate.clamp_min(0)
    return clipped


@lru_cache(maxsize=4)
def _basis(reference: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the principal axes of a proxy set, computed once."""
    points = _shrunk(reference)
    center = points.mean(0)
    _, axes = torch.linalg.eigh((points - center).T @ (points - center))
    return center, axes[:, -COMPONENTS:]


def _kernel(left: Tensor, right: Tensor, width: Tensor) -> Tensor:
    kernel: Tensor = (-0.5 * (_distances(left, right) / width).square()).exp()
    return kernel


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Distances [n, m], without matrix products, whose rounding gives a point a distance to itself."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def _shrunk(images: Tensor) -> Tensor:
    """Images [N, H, W, 3] as [N, 3 * SIDE^2] float64 in [0, 1], on the CPU."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.cpu().permute(0, 3, 1, 2).float() / 255, SIDE)
    return small.flatten(1).double()
