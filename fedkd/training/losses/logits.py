"""Losses between the student's logits and the teacher's probabilities.

Shapes: student_logits [B, C], already divided by the temperature; teacher_probs [B, C], rows sum
to one. Each returns a scalar, the mean over the batch. The caller multiplies by T^2.

The teacher's logits are not needed: log p differs from them by a constant in each row, and neither a softmax nor a
z-score depends on it. Probabilities of zero count as 1e-30 there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from fedkd.core.lazy import torch
from fedkd.training.losses.vectors import standard
from fedkd.training.objectives import mean_over_samples

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Scale = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Scales = Annotated[
    tuple[Scale, ...],
    BeforeValidator(lambda value: value.split("+") if isinstance(value, str) else value),
]

_MIN_PROB = 1e-30


@mean_over_samples
def cross_entropy(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """-sum_c p_c log softmax(s)_c: the softened cross-entropy (Hinton et al., 2015)."""
    return -(teacher_probs * student_logits.log_softmax(-1)).sum(-1).mean()


@mean_over_samples
def kl(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """KL(p || softmax(s)), zero if both are equal (Hinton et al., 2015).

    Its gradient is that of `cross_entropy`: they differ by the teacher's entropy.
    """
    entropy = -(teacher_probs * _log(teacher_probs)).sum(-1).mean()
    return cross_entropy(student_logits, teacher_probs) - entropy


@mean_over_samples
def mse(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """Squared distance of the two distributions, summed over classes (the Brier score)."""
    return (student_logits.softmax(-1) - teacher_probs).square().sum(-1).mean()


@mean_over_samples
def logit_mae(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference of logits, over batch and classes (FedMD: Li and Wang, 2019)."""
    return (student_logits - teacher_logits).abs().mean()


@mean_over_samples
def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of logits, over batch and classes (Ba and Caruana, 2014; Kim et al., 2021)."""
    return (student_logits - teacher_logits).square().mean()


@mean_over_samples
def dkd(
    student_logits: Tensor,
    teacher_probs: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
) -> Tensor:
    """The sum alpha * KL(b_t || b_s) + beta * KL(q_t || q_s): decoupled distillation (Zhao et al., 2022).

    b = (p_target, 1 - p_target) and q = the other classes' probabilities, normalized; in `kl` the second part has
    the weight 1 - p_target. ``labels`` [B] are the targets; by default the teacher's predicted classes (ours).
    A one-hot teacher has no probabilities for the other classes: its second part is zero.
    """
    target = (teacher_probs.argmax(-1) if labels is None else labels)[:, None]
    rest_probs = teacher_probs.scatter(-1, target, 0.0)
    # Not -inf: times the teacher's zero it would be NaN.
    rest_logits = student_logits.scatter(-1, target, torch.finfo(student_logits.dtype).min / 2)
    rest = rest_probs.sum(-1, keepdim=True)
    pair_logits = torch.cat([student_logits.gather(-1, target), rest_logits.logsumexp(-1, keepdim=True)], -1)
    pair_probs = torch.cat([teacher_probs.gather(-1, target), rest], -1)
    return alpha * kl(pair_logits, pair_probs) + beta * kl(rest_logits, rest_probs / rest.clamp_min(_MIN_PROB))


def dist(student_logits: Tensor, teacher_probs: Tensor, *, inter: Weight = 1.0, intra: Weight = 1.0) -> Tensor:
    """The sum inter * (1 - Pearson of rows) + intra * (1 - Pearson of columns), of probs (DIST: Huang et al., 2022).

    If a row or column of student or teacher is constant, its correlation is zero, without a gradient.
    """
    student_probs = student_logits.softmax(-1)
    rows = (standard(student_probs) * standard(teacher_probs)).sum(-1)
    columns = (standard(student_probs.mT) * standard(teacher_probs.mT)).sum(-1)
    return inter * (1 - rows.mean()) + intra * (1 - columns.mean())


@mean_over_samples
def standardized(student_logits: Tensor, teacher_probs: Tensor, *, temperature: Scale = 2.0) -> Tensor:
    """tau^2 * KL of the softmax of z-scores / tau: logit standardization (Sun et al., 2024).

    A z-score is (logit - mean) / standard deviation over the classes, with C - 1 as in the authors' code. The
    run's temperature cancels in it, so that T^2 is only a weight.
    """
    spread = (student_logits.shape[-1] - 1) ** 0.5 / temperature
    scores, teacher_scores = standard(student_logits) * spread, standard(_log(teacher_probs)) * spread
    return temperature**2 * kl(scores, teacher_scores.softmax(-1))


def multi_level(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    temperatures: Scales = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance: Weight = 1.0,
    batch: Weight = 1.0,
    classes: Weight = 1.0,
) -> Tensor:
    """Sum over tau of tau^2 KL + |P P' - Q Q'|^2 / B + |P' P - Q' Q|^2 / C: multi-level (MLKD: Jin et al., 2023).

    P and Q [B, C] are the student's and the teacher's probabilities at tau times the run's temperature. The three
    terms compare samples, pairs of samples and pairs of classes, each with its weight. On the command line,
    temperatures are joined by plus signs. Left out: the strongly augmented view of each image, and its confidence mask.
    """
    log_probs = _log(teacher_probs)
    loss = student_logits.new_zeros(())
    for temperature in temperatures:
        logits, theirs = student_logits / temperature, (log_probs / temperature).softmax(-1)
        ours = logits.softmax(-1)
        pairs = (ours @ ours.mT - theirs @ theirs.mT).square().sum(-1).mean()
        correlations = (ours.mT @ ours - theirs.mT @ theirs).square().sum(-1).mean()
        loss = loss + instance * temperature**2 * kl(logits, theirs) + batch * pairs + classes * correlations
    return loss


def _log(probs: Tensor) -> Tensor:
    """Finite logarithms; the gradient is zero below the bound."""
    return probs.clamp_min(_MIN_PROB).log()
