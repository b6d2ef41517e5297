"""Divergences between teacher and student by name (imports no torch by itself).

`divergence:` in a recipe names a function here or ``module:function`` of your own: (student's log-probabilities (N,
classes), teacher's) -> the divergence at each position (N,), or that and its derivative by the student's logits.
Keyword-only parameters are settings. Formulas and sources are in `posttrain.losses.distillation_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

ValueAndSlope = tuple["Tensor", "Tensor"]


def forward_kl_divergence(student: Tensor, teacher: Tensor) -> ValueAndSlope:
    """Compute KL(teacher | student): the student covers all that the teacher may write."""
    from posttrain.losses import distillation_loss

    return distillation_loss.forward_kl(student, teacher)


def reverse_kl_divergence(student: Tensor, teacher: Tensor) -> ValueAndSlope:
    """Compute KL(student | teacher): the student keeps to what the teacher finds likely."""
    from posttrain.losses import distillation_loss

    return distillation_loss.reverse_kl(student, teacher)


def jsd_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: Annotated[float, Field(gt=0, lt=1, description="Weight of the teacher in the mixture.")] = 0.5,
) -> ValueAndSlope:
    """Compute the generalised Jensen-Shannon divergence: of GKD, between the two KL divergences.

    Args:
        student: Log-probabilities.
        teacher: Likewise.
        beta: Weight of the teacher in the mixture.
    """
    from posttrain.losses import distillation_loss

    return distillation_loss.jensen_shannon(student, teacher, beta)


def skew_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: Annotated[float, Field(ge=0, lt=1, description="Part of the teacher in the student's mixture.")] = 0.1,
) -> ValueAndSlope:
    """Compute KL(teacher | alpha teacher + (1 - alpha) student), whose gradient stays small where q is (DistiLLM).

    Args:
        student: Log-probabilities.
        teacher: Likewise.
        alpha: Part of the teacher in the mixture.
    """
    from posttrain.losses import distillation_loss

    return distillation_loss.skewed_forward_kl(student, teacher, alpha)


def skew_reverse_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: Annotated[float, Field(ge=0, lt=1, description="Part of the student in the teacher's mixture.")] = 0.1,
) -> ValueAndSlope:
    """Compute KL(student | alpha student + (1 - alpha) teacher) (DistiLLM).

    Args:
        student: Log-probabilities.
        teacher: Likewise.
        alpha: Part of the student in the mixture.
    """
    from posttrain.losses import distillation_loss

    return distillation_loss.skewed_reverse_kl(student, teacher, alpha)
