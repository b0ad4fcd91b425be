"""csrc/linear_distillation_loss: chunks of rows, gradients of the loss in the same pass.

bfloat16 and float16 are computed in float32. The forward makes the gradients of `loss`; where
`hard` or `soft` get a gradient too, or there is no reduction, the backward computes once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.linear_head import targets

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")  # in the order of the kernel's enum
_LOWEST = -1e30  # minus infinity in a bias: 0 * 1e30 is 0, where 0 * inf is NaN


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _bias(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().clamp_min(_LOWEST).contiguous()


def _run(
    grad_results: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_topk_ids: Tensor | None,
    teacher_topk_log_probs: Tensor | None,
    temperature: float,
    hard_weight: float,
    divergence: str,
    beta: float,
    ignore_index: int,
    reduction: str,
) -> None:
    # Lists and names keep what was converted alive until the call is over.
    student = [native.dense(student_hidden), native.dense(student_weight), _bias(student_bias)]
    teacher = [native.dense(teacher_hidden), native.dense(teacher_weight), _bias(teacher_bias)]
    logits, log_probs = native.dense(teacher_logits), native.dense(teacher_topk_log_probs)
    ids = None if teacher_topk_ids is None else teacher_topk_ids.contiguous()
    target = target.contiguous()
    grads = [native.dense(grad) for grad in grad_results]
    if divergence == "jsd" and beta in (0, 1):
        divergence = "forward_kl" if beta == 0 else "reverse_kl"
    native.cpu().linear_distillation_loss(
        (
            student_hidden.size(0),
            student_hidden.size(1),
            0 if teacher_hidden is None else teacher_hidden.size(1),
            student_weight.size(0),
            0 if ids is None else ids.size(1),
        ),
        tuple(map(native.address, student)),
        target.data_ptr(),
        tuple(map(native.address, teacher)),
        native.address(logits),
        (native.address(ids), native.address(log_probs)),
        0 if teacher_hidden is not None else 1 if logits is not None else 2,  # enum Teacher
        ignore_index,
        (temperature, hard_weight, beta),
        _DIVERGENCES.index(divergence),
        targets.REDUCTIONS.index(reduction),
        tuple(map(native.address, grads)),
        tuple(map(native.address, results)),
        tuple(map(native.address, gradients)),
        torch.get_num_threads(),
    )


def fwd(
    student_hidden: Tensor, student_weight: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Arguments as in the schema of op.py, whose last two are the reduction and `save`."""
    *options, save = rest
    reduction = options[-1]
    shape = target.shape if reduction == "none" else ()
    results = [native.empty(shape) for _ in range(3)]
    made = targets.gradients_to_make((student_hidden, student_weight, rest[0]), save, reduction)
    gradients = [x if x.numel() else None for x in made]
    none = (None, None, None)
    _run(none, results, gradients, student_hidden, student_weight, target, *options)
    return *results, *made


def bwd(
    grad_loss: Tensor | None,
    grad_hard: Tensor | None,
    grad_soft: Tensor | None,
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Arguments as in the schema of op.py, whose last one is `needs`."""
    *options, needs = rest
    gradients = [
        native.empty(x.shape) if x is not None and needed else None
        for x, needed in zip((student_hidden, student_weight, rest[0]), needs, strict=True)
    ]
    grads, none = (grad_loss, grad_hard, grad_soft), (None, None, None)
    _run(grads, none, gradients, student_hidden, student_weight, target, *options)
    return tuple(None if g is None else g.to(student_hidden.dtype) for g in gradients)
