"""A chunk of rows at a time: products by torch, then one Triton kernel for losses and gradients.

Logits are float32 whatever the dtype, and their gradients take their place. A loss with a reduction
makes its gradients in the forward. Ignored rows are masked: leaving them out needs their number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.linear_head import linear_head, matmul, targets
from mbm_kernels.ops.linear_head.linear_head import HeadGradients


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _run(
    found: HeadGradients,
    losses: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    N, H = hidden.shape
    V = weight.size(0)
    sizes = {"N": N, "H": H, "V": V}
    kernel = triton_launch.kernel("linear_cross_entropy", "rows")
    share, factor = found.in_kernel
    for rows in linear_head.chunks(N, 4 * V):
        logits = matmul.product(hidden[rows], weight.t())
        room = found.room(logits)
        part = share[rows] if share is not None and share.dim() else share
        count = logits.size(0)
        kernel(
            lambda _, count=count: (count,),  # type: ignore[misc]
            *(logits, bias, target[rows], part, None if losses is None else losses[rows], room),
            *(V, ignore_index, label_smoothing, softcap or 1.0, z_loss, factor, logits.stride(0)),
            0 if room is None else room.stride(0),
            0 if bias is None else bias.stride(0),
            target.stride(0),
            0 if part is None or part.dim() == 0 else part.stride(0),
            dtype=hidden.dtype,
            sizes=sizes,
            CAPPED=softcap is not None,
            SMOOTHED=label_smoothing != 0,
        )
        if room is not None:
            found.add(rows, room, hidden[rows], weight)
    found.finish()


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
    inputs = (hidden, weight, bias)
    made = targets.gradients_to_make(inputs, save, reduction)
    wanted = [
        g if x is not None and s and reduction != "none" else None
        for x, s, g in zip(inputs, save, made, strict=True)
    ]
    share, count = linear_head.shares(None, target, ignore_index, reduction)
    losses = hidden.new_empty(target.shape, dtype=torch.float32)
    _run(
        HeadGradients(wanted, hidden.dtype, share, target == ignore_index),
        *(losses, hidden, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss),
    )
    return linear_head.reduced(losses, count, reduction), *made


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
    wanted = [
        x.new_empty(x.shape, dtype=torch.float32) if x is not None and needed else None
        for x, needed in zip((hidden, weight, bias), needs, strict=True)
    ]
    share, _ = linear_head.shares(grad_loss, target, ignore_index, reduction)
    _run(
        HeadGradients(wanted, hidden.dtype, share, target == ignore_index),
        *(None, hidden, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss),
    )
    return tuple(None if g is None else g.to(hidden.dtype) for g in wanted)
