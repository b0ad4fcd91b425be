"""csrc/linear_distillation_loss: chunks of rows, gradients of the loss in the same pass.

bfloat16 and float16 are computed in float32. The forward makes the gradients of `loss`; where
`hard` or `soft` get a gradient too, or there is no reduction, the backward computes once more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.linear_distillation_loss.problem import DIVERGENCES, Inputs, Problem
from mbm_kernels.ops.linear_head import targets

_LOWEST = -1e30  # minus infinity in a bias: 0 * 1e30 is 0, where 0 * inf is NaN
_SOURCES = ("teacher_hidden", "teacher_logits", "teacher_topk")  # in the order of the enum Teacher

Maybe = Tensor | None


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _bias(tensor: Tensor) -> Tensor:
    return tensor.float().clamp_min(_LOWEST).contiguous()


_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "target": Tensor.contiguous,
    "teacher_topk_ids": Tensor.contiguous,
    "student_bias": _bias,
    "teacher_bias": _bias,
}
_FORM_OF_EACH = tuple(_FORMS.get(name, native.dense) for name in Inputs._fields)


def _block(p: Problem) -> bytes:
    sizes, options = p.sizes, p.options
    values = {
        **{name: sizes[name] for name in "NVk"},
        "Hs": sizes["H"],
        "Ht": sizes["H_teacher"],
        "teacher": _SOURCES.index(p.source),
        "divergence": DIVERGENCES.index(p.divergence),
        "reduction": targets.REDUCTIONS.index(options.reduction),
        "ignore_index": options.ignore_index,
    }
    for name in ("temperature", "hard_weight", "beta"):
        values[name] = native.float_bits(getattr(options, name))
    return native.block(native.cpu().linear_distillation_problem_fields(), values)


def _run(
    p: Problem,
    tensors: Sequence[Maybe],
    grad_results: Sequence[Maybe],
    results: Sequence[Maybe],
    gradients: Sequence[Maybe],
) -> None:
    # Named, so that what was converted lives as long as the call.
    dense = [None if x is None else form(x) for x, form in zip(tensors, _FORM_OF_EACH, strict=True)]
    grads = [native.dense(grad) for grad in grad_results]
    native.cpu().linear_distillation_loss(
        derived(p, "cpu", _block),
        *(native.addresses(given) for given in (dense, grads, results, gradients)),
        torch.get_num_threads(),
    )


def fwd(p: Problem, *args: Any) -> tuple[Maybe, ...]:
    *tensors, save = args
    results = [native.empty(p.loss_shape) for _ in range(3)]
    gradients = native.empty_where(p.shapes, save if p.makes_gradients else (False,) * 3)
    _run(p, tensors, (None,) * 3, results, gradients)
    return *results, *gradients


def bwd(
    p: Problem,
    grads: Sequence[Maybe],
    tensors: Sequence[Maybe],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    gradients = native.empty_where(p.shapes, needs)
    _run(p, tensors, grads, (None,) * 3, gradients)
    return tuple(None if g is None else g.to(p.dtype) for g in gradients)
