"""csrc/linear_cross_entropy: a chunk of rows at a time, gradients in the same pass as the loss.

bfloat16 and float16 are computed in float32. Without reduction a row's gradient is known only in
the backward, which then computes the logits once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.linear_cross_entropy.problem import Problem
from mbm_kernels.ops.linear_head import targets

Maybe = Tensor | None


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _block(p: Problem) -> bytes:
    options = p.options
    values = {
        **{name: p.sizes[name] for name in "NHV"},
        "ignore_index": options.ignore_index,
        "label_smoothing": native.float_bits(options.label_smoothing),
        "softcap": native.float_bits(options.softcap or 0.0),
        "z_loss": native.float_bits(options.z_loss),
        "reduction": targets.REDUCTIONS.index(options.reduction),
    }
    return native.block(native.cpu().linear_cross_entropy_problem_fields(), values)


def _run(
    p: Problem, tensors: Sequence[Maybe], grad_loss: Maybe, loss: Maybe, gradients: Sequence[Maybe]
) -> None:
    hidden, weight, target, bias = tensors
    assert target is not None
    # Named, so that what was converted lives as long as the call.
    dense = (native.dense(hidden), native.dense(weight), target.contiguous(), native.dense(bias))
    grad_loss = native.dense(grad_loss)
    native.cpu().linear_cross_entropy(
        derived(p, "cpu", _block),
        native.addresses(dense),
        native.address(grad_loss),
        native.address(loss),
        native.addresses(gradients),
        torch.get_num_threads(),
    )


def fwd(p: Problem, *args: Any) -> tuple[Maybe, ...]:
    *tensors, save = args
    loss = native.empty(p.loss_shape)
    gradients = native.empty_where(p.shapes, save if p.makes_gradients else (False,) * 3)
    _run(p, tensors, None, loss, gradients)
    return loss, *gradients


def bwd(
    p: Problem,
    grads: Sequence[Maybe],
    tensors: Sequence[Maybe],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    gradients = native.empty_where(p.shapes, needs)
    _run(p, tensors, grads[0], None, gradients)
    return tuple(None if g is None else g.to(p.dtype) for g in gradients)
