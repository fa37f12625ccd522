"""The instance relationship graph: a batch's images as a graph, at several layers (IRG: Liu et al., 2019).

The paper's: a layer's vertices are its features, its edges A_l(i, j) = |f_l(x_i) - f_l(x_j)|^2; from one layer to
another, each vertex moves by L(i) = |f_l(x_i) - f_m(x_i)|^2, and the edges by E = |A_l - A_m|^2. Student and
teacher are compared by squared differences of all four; its experiments leave out E, which is costly.

Ours: A and L are divided by their mean over the batch, so that neither widths nor scales count; sums
over images, pairs and layers are means, and so all weights are 1 (0 for E).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def graph(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    vertex: float = 1.0,
    edge: float = 1.0,
    vertex_move: float = 1.0,
    edge_move: float = 0.0,
) -> Tensor:
    """The weighted sum of the squared differences of vertices (of the last layer), edges, and moves between neighbors.

    Features [B, ...] of as many layers of each side, in order; flattened to [B, D_l]. Where a term's weight is not
    zero, widths must agree as it needs: at the last layer between the sides for ``vertex``; between the
    neighboring layers of one side for ``vertex_move``. The caller pools or projects. The paper's "one to many" mode
    is the teacher's last layer, repeated, without moves.
    """
    if not 0 < len(student) == len(teacher):
        raise ValueError(f"as many layers of each side, not {len(student)} and {len(teacher)}")
    sides = [[features.flatten(1) for features in side] for side in (student, teacher)]
    loss = student[-1].new_zeros(())
    if vertex:
        loss = loss + vertex * _squares(sides[0][-1], sides[1][-1]).mean() / sides[0][-1].shape[1]
    edges = [torch.stack([_edges(features) for features in side]) for side in sides]
    loss = loss + edge * (edges[0] - edges[1]).square().mean()
    if len(student) > 1 and vertex_move:
        moves = [torch.stack([_moves(*pair) for pair in pairwise(side)]) for side in sides]
        loss = loss + vertex_move * (moves[0] - moves[1]).square().mean()
    if len(student) > 1 and edge_move:
        changes = [side.diff(dim=0).square().mean((1, 2)) for side in edges]
        loss = loss + edge_move * (changes[0] - changes[1]).square().mean()
    return loss


def _edges(features: Tensor) -> Tensor:
    """Squared distances [B, B] with mean one over pairs of different images; zeros where all images coincide."""
    rows = features - features.mean(0)  # closer to zero, the products below lose fewer digits
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares - 2 * rows @ rows.mT).clamp_min(0)
    mean = distances.sum() / max(len(rows) * (len(rows) - 1), 1)
    noise = (16 * torch.finfo(rows.dtype).eps) ** 2 * features.detach().square().sum(1).mean()
    return torch.where(mean > noise, distances / torch.where(mean > noise, mean, 1.0), 0.0)


def _moves(before: Tensor, after: Tensor) -> Tensor:
    """Squared distances [B] from layer to layer, with mean one; zeros where nothing moves."""
    moves = _squares(before, after)
    mean = moves.mean()
    return torch.where(mean > 0, moves / torch.where(mean > 0, mean, 1.0), 0.0)


def _squares(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances [B] of rows."""
    if left.shape != right.shape:
        raise ValueError(f"vertices of equal width, not {tuple(left.shape)} and {tuple(right.shape)}")
    return (left - right).square().sum(1)
