"""Losses on logits: what pulls a student's answer to its teacher's.

Shapes: student_logits [B, C], already divided by the temperature; teacher_probs [B, C], rows sum
to one. Each returns a scalar, the mean over the batch. The factor T^2 is the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """-sum_c p_c log softmax(s)_c: the softened cross-entropy (Hinton et al., 2015)."""
    return -(teacher_probs * student_logits.log_softmax(-1)).sum(-1).mean()


def kl(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """KL(p || softmax(s)), zero where they agree (Hinton et al., 2015).

    Its gradient is that of `cross_entropy`: they differ by the teacher's entropy.
    """
    entropy = -(teacher_probs * teacher_probs.clamp_min(1e-30).log()).sum(-1).mean()
    return cross_entropy(student_logits, teacher_probs) - entropy


def mse(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """Squared distance of the two distributions, summed over classes (the Brier score)."""
    return (student_logits.softmax(-1) - teacher_probs).square().sum(-1).mean()


def logit_mae(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference of logits, over batch and classes (FedMD: Li and Wang, 2019)."""
    return (student_logits - teacher_logits).abs().mean()
