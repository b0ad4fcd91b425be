"""Distillation through a linear head, as a module."""

from torch import Tensor

from mbm_kernels._core import dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels.ops.linear_distillation_loss.op import (
    check_options,
    linear_distillation_loss,
)


class LinearDistillationLoss(DropIn):
    """`mbm_kernels.linear_distillation_loss` with its options fixed; it has no parameters.

    Args:
        temperature: above 0; both distributions of the soft loss are tempered by it.
        hard_weight: 0 to 1, the share of the cross-entropy in the loss.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: 0 to 1, for "jsd".
        ignore_index: rows with this target do not count.
        reduction: "none", "mean" or "sum".
        backend: as for `mbm_kernels.linear_distillation_loss`.

    Raises:
        ValueError: an option does not fit.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        hard_weight: float = 0.5,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
    ):
        dispatch.check_backend("nn.LinearDistillationLoss", backend)
        super().__init__()
        check_options(temperature, hard_weight, divergence, beta, reduction)
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.divergence = divergence
        self.beta = beta
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

    @tracing.leaf
    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        target: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_topk: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and returns (loss, hard, soft) of `mbm_kernels.linear_distillation_loss`."""
        return linear_distillation_loss(
            student_hidden,
            student_weight,
            target,
            student_bias=student_bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            teacher_topk=teacher_topk,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            divergence=self.divergence,
            beta=self.beta,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        names = ("temperature", "hard_weight", "divergence", "beta", "ignore_index", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "backend"))
