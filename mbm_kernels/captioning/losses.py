"""The two losses of training, from this package's operations or from stock PyTorch.

hidden [B, T, H], weight [V, H], bias [V], target int64 [B, T]; each returns a scalar mean over the
targets that are not ``ignore_index``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.ops.linear_distillation_loss import reference


@dataclass(frozen=True)
class Losses:
    """Signatures of mbm_kernels' ``linear_cross_entropy`` and ``linear_distillation_loss``."""

    cross_entropy: Callable[..., Tensor]
    distillation: Callable[..., Any]


def stock_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the projected hidden states."""
    logits = F.linear(hidden.flatten(0, 1), weight, bias)
    return F.cross_entropy(
        logits, target.flatten(), ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def stock_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    temperature: float,
    hard_weight: float,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft): cross-entropy and temperature^2 times a divergence from the teacher."""
    if divergence != "forward_kl" or teacher_hidden is None or teacher_weight is None:
        return reference.linear_distillation_loss(
            student_hidden,
            student_weight,
            target,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            teacher_topk=teacher_topk,
            temperature=temperature,
            hard_weight=hard_weight,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
        )
    keep = target != ignore_index
    logits = F.linear(student_hidden[keep], student_weight, student_bias)  # [rows kept, V]
    teacher = F.linear(teacher_hidden[keep], teacher_weight, teacher_bias).detach()
    hard = F.cross_entropy(logits, target[keep])
    soft = temperature**2 * F.kl_div(
        (logits / temperature).log_softmax(dim=-1),
        (teacher / temperature).log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return hard_weight * hard + (1 - hard_weight) * soft, hard, soft


STOCK = Losses(stock_cross_entropy, stock_distillation)


def losses_named(layers: str) -> Losses:
    """The table for ``"mbm"`` or ``"stock"``.

    Raises:
        ValueError: for any other name.
    """
    if layers == "stock":
        return STOCK
    if layers == "mbm":
        import mbm_kernels

        return Losses(mbm_kernels.linear_cross_entropy, mbm_kernels.linear_distillation_loss)
    raise ValueError(f"layers: got {layers!r}, expected 'mbm' or 'stock'")
