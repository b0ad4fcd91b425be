"""A chunk of rows at a time: products by torch, then one Triton kernel for losses and gradients.

Logits are float32 whatever the dtype, and the student's gradients take their place. With a
reduction the gradients of `loss` are made in the forward. Ignored rows are masked: leaving them out
needs their number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.linear_head import linear_head, matmul, targets
from mbm_kernels.ops.linear_head.linear_head import HeadGradients

_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


@dataclass
class _Call:
    """The inputs by their names in the schema."""

    student_hidden: Tensor
    student_weight: Tensor
    target: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    teacher_topk_ids: Tensor | None
    teacher_topk_log_probs: Tensor | None
    temperature: float
    hard_weight: float
    divergence: str
    beta: float
    ignore_index: int
    reduction: str

    @property
    def student(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.student_hidden, self.student_weight, self.student_bias

    @property
    def ignored(self) -> Tensor:
        return self.target == self.ignore_index

    def run(
        self,
        found: HeadGradients,
        losses: tuple[Tensor, Tensor] | None,
        shares: tuple[Tensor | None, Tensor | None],
        weights: tuple[float, float],
        which: tuple[bool, bool],
    ) -> None:
        """Losses (hard, soft) [N] and gradients, of the losses that `which` names; `weights` and
        `shares`, [N] or one number or None for 1, are what each one's gradient is multiplied by."""
        N, H = self.student_hidden.shape
        V = self.student_weight.size(0)
        k = 0 if self.teacher_topk_ids is None else self.teacher_topk_ids.size(1)
        divergence = self.divergence
        if divergence == "jsd" and self.beta in (0, 1):
            divergence = "reverse_kl" if self.beta else "forward_kl"
        _, factor = found.in_kernel
        T = self.temperature
        numbers = (1 / T, T * T, self.beta, factor * weights[0], factor * weights[1] * T)
        constants = {
            "DIVERGENCE": _DIVERGENCES[divergence],
            "POWER": int(T) if T in (1, 2, 4) else 0,
            "HARD": which[0],
            "SOFT": which[1],
        }
        sizes = {"N": N, "H": H, "V": V, "k": k}
        hard, soft = (None, None) if losses is None else losses
        for rows in linear_head.chunks(N, 4 * V * (1 if self.teacher_hidden is None else 2)):
            logits = matmul.product(self.student_hidden[rows], self.student_weight.t())
            room = found.room(logits)
            parts = [s[rows] if s is not None and s.dim() else s for s in shares]
            outputs = (
                *(self.target[rows], *parts),
                *(None if x is None else x[rows] for x in (hard, soft)),
                room,
            )
            strides = (
                0 if room is None else room.stride(0),
                0 if self.student_bias is None else self.student_bias.stride(0),
            )
            share_n = max((s.stride(0) for s in parts if s is not None and s.dim()), default=0)
            if self.teacher_topk_ids is not None:
                assert self.teacher_topk_log_probs is not None
                ids, log_probs = self.teacher_topk_ids[rows], self.teacher_topk_log_probs[rows]
                picked = logits.new_empty(ids.shape)
                self._launch(
                    "bins",
                    logits.size(0),
                    *(logits, self.student_bias, ids, log_probs, picked, *outputs),
                    *(V, k, self.ignore_index, *numbers, logits.stride(0), *ids.stride()),
                    *(*log_probs.stride(), *strides, self.target.stride(0), share_n),
                    sizes=sizes,
                    REST=k < V,
                    **constants,
                )
            else:
                teacher, bias = self._teacher(rows)
                self._launch(
                    "rows",
                    logits.size(0),
                    *(logits, self.student_bias, teacher, bias, *outputs),
                    *(
                        V,
                        self.ignore_index,
                        *numbers,
                        logits.stride(0),
                        *teacher.stride(),
                        *strides,
                    ),
                    *(0 if bias is None else bias.stride(0), self.target.stride(0), share_n),
                    sizes=sizes,
                    **constants,
                )
            if room is not None:
                found.add(rows, room, self.student_hidden[rows], self.student_weight)
        found.finish()

    def _teacher(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits of these rows and the bias that they still lack."""
        if self.teacher_logits is not None:
            return self.teacher_logits[rows], None
        assert self.teacher_hidden is not None
        assert self.teacher_weight is not None
        product = matmul.product(self.teacher_hidden[rows], self.teacher_weight.t())
        return product, self.teacher_bias

    def _launch(self, name: str, count: int, *args: Any, **named: Any) -> None:
        kernel = triton_launch.kernel("linear_distillation_loss", name)
        kernel(lambda _: (count,), *args, dtype=self.student_hidden.dtype, **named)


def fwd(*args: Any) -> tuple[Tensor, ...]:
    """The schema's inputs and `save`: (loss, hard, soft, the gradients made)."""
    call, save = _Call(*args[:-1]), args[-1]
    made = targets.gradients_to_make(call.student, save, call.reduction)
    wanted = [
        g if x is not None and s and call.reduction != "none" else None
        for x, s, g in zip(call.student, save, made, strict=True)
    ]
    share, count = linear_head.shares(None, call.target, call.ignore_index, call.reduction)
    found = HeadGradients(wanted, call.student_hidden.dtype, share, call.ignored)
    rows = tuple(
        call.student_hidden.new_empty(call.target.shape, dtype=torch.float32) for _ in range(2)
    )
    weights = (call.hard_weight, 1 - call.hard_weight)
    in_kernel = found.in_kernel[0]
    which = (weights[0] != 0, weights[1] != 0)
    call.run(found, (rows[0], rows[1]), (in_kernel, in_kernel), weights, which)
    hard, soft = (linear_head.reduced(x, count, call.reduction) for x in rows)
    # A term of weight 0 is absent, even where it is infinite.
    loss = sum(w * x for w, x in zip(weights, (hard, soft), strict=True) if w != 0)
    assert isinstance(loss, Tensor)
    return loss, hard, soft, *made


def bwd(
    grad_loss: Tensor | None,
    grad_hard: Tensor | None,
    grad_soft: Tensor | None,
    *args: Any,
) -> tuple[Tensor | None, ...]:
    call, needs = _Call(*args[:-1]), args[-1]
    wanted: list[Tensor | None] = [
        x.new_empty(x.shape, dtype=torch.float32) if x is not None and needed else None
        for x, needed in zip(call.student, needs, strict=True)
    ]
    totals: list[Tensor | None] = []
    for weight, grad in ((call.hard_weight, grad_hard), (1 - call.hard_weight, grad_soft)):
        if grad_loss is not None and weight != 0:
            by_loss = weight * grad_loss
            grad = by_loss if grad is None else grad + by_loss
        if grad is not None:
            grad, _ = linear_head.shares(grad, call.target, call.ignore_index, call.reduction)
            assert grad is not None
            grad = grad.contiguous()
        totals.append(grad)
    found = HeadGradients(wanted, call.student_hidden.dtype, None, call.ignored)
    which = (totals[0] is not None, totals[1] is not None)
    call.run(found, None, (totals[0], totals[1]), (1.0, 1.0), which)
    return tuple(None if g is None else g.to(call.student_hidden.dtype) for g in wanted)
