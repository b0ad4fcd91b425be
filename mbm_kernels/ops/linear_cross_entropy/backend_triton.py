"""A chunk of rows at a time: products by torch, then one Triton kernel for losses and gradients.

Logits are float32 whatever the dtype, and their gradients take their place. A loss with a reduction
makes its gradients in the forward. Ignored rows are masked: leaving them out needs their number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.linear_cross_entropy.problem import Problem
from mbm_kernels.ops.linear_head import linear_head, matmul
from mbm_kernels.ops.linear_head.linear_head import HeadGradients


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _run(p: Problem, tensors: Sequence[Any], found: HeadGradients, losses: Tensor | None) -> None:
    hidden, weight, target, bias = tensors
    options, V = p.options, weight.size(0)
    kernel = triton_launch.kernel("linear_cross_entropy", "rows")
    share, factor = found.in_kernel
    for rows in linear_head.chunks(hidden.size(0), 4 * V):
        logits = matmul.product(hidden[rows], weight.t())
        room = found.room(logits)
        part = share[rows] if share is not None and share.dim() else share
        count = logits.size(0)
        kernel(
            lambda _, count=count: (count,),  # type: ignore[misc]
            *(logits, bias, target[rows], part, None if losses is None else losses[rows], room),
            *(V, options.ignore_index, options.label_smoothing, options.softcap or 1.0),
            *(options.z_loss, factor, logits.stride(0)),
            0 if room is None else room.stride(0),
            0 if bias is None else bias.stride(0),
            target.stride(0),
            0 if part is None or part.dim() == 0 else part.stride(0),
            dtype=p.dtype,
            sizes={name: p.sizes[name] for name in "NHV"},
            CAPPED=options.softcap is not None,
            SMOOTHED=options.label_smoothing != 0,
        )
        if room is not None:
            found.add(rows, room, hidden[rows], weight)
    found.finish()


def _gradients(
    p: Problem, tensors: Sequence[Any], wanted: Sequence[bool], share: Tensor | None
) -> HeadGradients:
    hidden, weight, target, bias = tensors
    ignored = target == p.options.ignore_index
    made = linear_head.empty_where((hidden, weight, bias), wanted)
    return HeadGradients(made, p.dtype, share, ignored)


def fwd(p: Problem, *args: Any) -> tuple[Tensor | None, ...]:
    *tensors, save = args
    target, options = tensors[2], p.options
    share, count = linear_head.shares(None, target, options.ignore_index, options.reduction)
    wanted = save if p.makes_gradients else (False,) * 3
    found = _gradients(p, tensors, wanted, share)
    losses = target.new_empty(target.shape, dtype=torch.float32)
    _run(p, tensors, found, losses)
    return linear_head.reduced(losses, count, options.reduction), *found.wanted


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    options = p.options
    share, _ = linear_head.shares(grads[0], tensors[2], options.ignore_index, options.reduction)
    found = _gradients(p, tensors, needs, share)
    _run(p, tensors, found, None)
    return tuple(None if g is None else g.to(p.dtype) for g in found.wanted)
