"""A chunk of rows at a time: products by torch, then one Triton kernel for losses and gradients.

Logits are float32 whatever the dtype, and the student's gradients take their place. With a
reduction the gradients of `loss` are made in the forward. Ignored rows are masked: leaving them out
needs their number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.linear_distillation_loss.problem import DIVERGENCES, Inputs, Problem
from mbm_kernels.ops.linear_head import linear_head, matmul
from mbm_kernels.ops.linear_head.linear_head import HeadGradients


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


class _Call:
    """One call's inputs, and the launches for them."""

    def __init__(self, p: Problem, tensors: Sequence[Any]):
        self.p, self.inputs, self.options = p, Inputs(*tensors), p.options
        self.ignored = self.inputs.target == self.options.ignore_index

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
        x, sizes, T = self.inputs, self.p.sizes, self.options.temperature
        N, V, k = sizes["N"], sizes["V"], sizes["k"]
        _, factor = found.in_kernel
        numbers = (1 / T, T * T, self.options.beta, factor * weights[0], factor * weights[1] * T)
        constants = {
            "DIVERGENCE": DIVERGENCES.index(self.p.divergence),
            "POWER": int(T) if T in (1, 2, 4) else 0,
            "HARD": which[0],
            "SOFT": which[1],
        }
        sizes = {name: sizes[name] for name in "NHVk"}
        hard, soft = (None, None) if losses is None else losses
        for rows in linear_head.chunks(N, 4 * V * (1 if x.teacher_hidden is None else 2)):
            logits = matmul.product(x.student_hidden[rows], x.student_weight.t())
            room = found.room(logits)
            parts = [s[rows] if s is not None and s.dim() else s for s in shares]
            outputs = (
                *(x.target[rows], *parts),
                *(None if y is None else y[rows] for y in (hard, soft)),
                room,
            )
            strides = (
                0 if room is None else room.stride(0),
                0 if x.student_bias is None else x.student_bias.stride(0),
            )
            share_n = max((s.stride(0) for s in parts if s is not None and s.dim()), default=0)
            if x.teacher_topk_ids is not None:
                assert x.teacher_topk_log_probs is not None
                ids, log_probs = x.teacher_topk_ids[rows], x.teacher_topk_log_probs[rows]
                picked = logits.new_empty(ids.shape)
                self._launch(
                    "bins",
                    logits.size(0),
                    *(logits, x.student_bias, ids, log_probs, picked, *outputs),
                    *(V, k, self.options.ignore_index, *numbers, logits.stride(0), *ids.stride()),
                    *(*log_probs.stride(), *strides, x.target.stride(0), share_n),
                    sizes=sizes,
                    REST=k < V,
                    **constants,
                )
            else:
                teacher, bias = self._teacher(rows)
                self._launch(
                    "rows",
                    logits.size(0),
                    *(logits, x.student_bias, teacher, bias, *outputs),
                    *(
                        V,
                        self.options.ignore_index,
                        *numbers,
                        logits.stride(0),
                        *teacher.stride(),
                        *strides,
                    ),
                    *(0 if bias is None else bias.stride(0), x.target.stride(0), share_n),
                    sizes=sizes,
                    **constants,
                )
            if room is not None:
                found.add(rows, room, x.student_hidden[rows], x.student_weight)
        found.finish()

    def _teacher(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits of these rows and the bias that they still lack."""
        x = self.inputs
        if x.teacher_logits is not None:
            return x.teacher_logits[rows], None
        assert x.teacher_hidden is not None
        assert x.teacher_weight is not None
        product = matmul.product(x.teacher_hidden[rows], x.teacher_weight.t())
        return product, x.teacher_bias

    def _launch(self, name: str, count: int, *args: Any, **named: Any) -> None:
        kernel = triton_launch.kernel("linear_distillation_loss", name)
        kernel(lambda _: (count,), *args, dtype=self.p.dtype, **named)


def fwd(p: Problem, *args: Any) -> tuple[Tensor | None, ...]:
    *tensors, save = args
    call, options = _Call(p, tensors), p.options
    target, reduction = call.inputs.target, options.reduction
    wanted = save if p.makes_gradients else (False,) * 3
    made = linear_head.empty_where(call.inputs.student, wanted)
    share, count = linear_head.shares(None, target, options.ignore_index, reduction)
    found = HeadGradients(made, p.dtype, share, call.ignored)
    rows = tuple(target.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    weights = (options.hard_weight, 1 - options.hard_weight)
    in_kernel = found.in_kernel[0]
    which = (weights[0] != 0, weights[1] != 0)
    call.run(found, (rows[0], rows[1]), (in_kernel, in_kernel), weights, which)
    hard, soft = (linear_head.reduced(x, count, reduction) for x in rows)
    # A term of weight 0 is absent, even where it is infinite.
    loss = sum(w * x for w, x in zip(weights, (hard, soft), strict=True) if w != 0)
    assert isinstance(loss, Tensor)
    return loss, hard, soft, *made


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call, options = _Call(p, tensors), p.options
    wanted = linear_head.empty_where(call.inputs.student, needs)
    grad_loss, *grads_of_terms = grads
    totals: list[Tensor | None] = []
    terms = (options.hard_weight, 1 - options.hard_weight)
    for weight, grad in zip(terms, grads_of_terms, strict=True):
        if grad_loss is not None and weight != 0:
            by_loss = weight * grad_loss
            grad = by_loss if grad is None else grad + by_loss
        if grad is not None:
            target = call.inputs.target
            grad, _ = linear_head.shares(grad, target, options.ignore_index, options.reduction)
            assert grad is not None
            grad = grad.contiguous()
        totals.append(grad)
    found = HeadGradients(wanted, p.dtype, None, call.ignored)
    which = (totals[0] is not None, totals[1] is not None)
    call.run(found, None, (totals[0], totals[1]), (1.0, 1.0), which)
    return tuple(None if g is None else g.to(p.dtype) for g in wanted)
