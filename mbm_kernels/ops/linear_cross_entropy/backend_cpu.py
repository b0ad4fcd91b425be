"""csrc/linear_cross_entropy: a chunk of rows at a time, gradients in the same pass as the loss.

bfloat16 and float16 are computed in float32. Without reduction a row's gradient is known only in
the backward, which then computes the logits once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.linear_head import targets


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _run(
    grad_loss: Tensor | None,
    loss: Tensor | None,
    gradients: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
) -> None:
    # Named, so that what was converted lives as long as the call.
    grad_loss, dense_hidden, dense_weight = (
        native.dense(grad_loss),
        native.dense(hidden),
        native.dense(weight),
    )
    bias, target = native.dense(bias), target.contiguous()
    native.cpu().linear_cross_entropy(
        (hidden.size(0), hidden.size(1), weight.size(0)),
        native.address(dense_hidden),
        native.address(dense_weight),
        native.address(bias),
        target.data_ptr(),
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        targets.REDUCTIONS.index(reduction),
        native.address(grad_loss),
        native.address(loss),
        tuple(map(native.address, gradients)),
        torch.get_num_threads(),
    )


def fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    save: Sequence[bool],
) -> tuple[Tensor, ...]:
    loss = native.empty(target.shape if reduction == "none" else ())
    made = targets.gradients_to_make((hidden, weight, bias), save, reduction)
    options = (ignore_index, label_smoothing, softcap, z_loss, reduction)
    _run(
        None, loss, [x if x.numel() else None for x in made], hidden, weight, target, bias, *options
    )
    return loss, *made


def bwd(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    gradients = [
        native.empty(x.shape) if x is not None and needed else None
        for x, needed in zip((hidden, weight, bias), needs, strict=True)
    ]
    options = (ignore_index, label_smoothing, softcap, z_loss, reduction)
    _run(grad_loss, None, gradients, hidden, weight, target, bias, *options)
    return tuple(None if g is None else g.to(hidden.dtype) for g in gradients)
