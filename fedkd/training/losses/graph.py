"""The instance relationship graph: the samples of a batch as a graph, at several layers (IRG: Liu et al., 2019).

In the paper, the vertices of a layer are its features, and its edges are A_l(i, j) = |f_l(x_i) - f_l(x_j)|^2. From one
layer to another, each vertex moves by L(i) = |f_l(x_i) - f_m(x_i)|^2, and the edges by E = |A_l - A_m|^2. Student and
teacher are compared by squared differences of all four. The paper's experiments leave out E, which is costly.

Here A and L are divided by their mean over the batch, so that widths and scales do not matter. Sums over samples, pairs
and layers are means, so all default weights are 1 (0 for E).
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
    """The weighted sum of the squared differences of vertices (last layer), edges, and moves from layer to layer.

    Features [B, ...] of equally many layers of student and teacher, in order; flattened to [B, D_l]. If ``vertex`` is
    not zero, the last layers of both must have equal widths; if ``vertex_move`` is not zero, all layers of each side.
    The caller pools or projects. For the paper's "one to many" mode, repeat the teacher's last layer and set the
    weights of the moves to zero.
    """
    if not 0 < len(student) == len(teacher):
        raise ValueError(f"student and teacher need equally many layers, not {len(student)} and {len(teacher)}")
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
    """Squared distances [B, B] with mean one over pairs of different samples; zeros if all samples coincide."""
    rows = features - features.mean(0)  # centered, the products below lose fewer digits
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares - 2 * rows @ rows.mT).clamp_min(0)
    mean = distances.sum() / max(len(rows) * (len(rows) - 1), 1)
    noise = (16 * torch.finfo(rows.dtype).eps) ** 2 * features.detach().square().sum(1).mean()
    return torch.where(mean > noise, distances / torch.where(mean > noise, mean, 1.0), 0.0)


def _moves(before: Tensor, after: Tensor) -> Tensor:
    """Squared distances [B] from layer to layer, with mean one; zeros if no vertex moves."""
    moves = _squares(before, after)
    mean = moves.mean()
    return torch.where(mean > 0, moves / torch.where(mean > 0, mean, 1.0), 0.0)


def _squares(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances [B] of rows."""
    if left.shape != right.shape:
        raise ValueError(f"vertices need equal widths, not {tuple(left.shape)} and {tuple(right.shape)}")
    return (left - right).square().sum(1)
