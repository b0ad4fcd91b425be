"""csrc/contrastive_loss: a chunk of images at a time against all texts; gradients in the forward.

bfloat16 and float16 are computed in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.contrastive_loss.problem import KINDS, Problem

Maybe = Tensor | None


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _block(p: Problem) -> bytes:
    values = {"B": p.sizes["B"], "D": p.sizes["D"], "kind": KINDS.index(p.kind)}
    return native.block(native.cpu().contrastive_loss_problem_fields(), values)


def _run(
    p: Problem, tensors: Sequence[Maybe], grad_loss: Maybe, loss: Maybe, gradients: Sequence[Maybe]
) -> None:
    # Named, so that what was converted lives as long as the call.
    dense = [native.dense(x) for x in tensors]
    grad_loss = native.dense(grad_loss)
    native.cpu().contrastive_loss(
        derived(p, "cpu", _block),
        native.addresses(dense),
        native.address(grad_loss),
        native.address(loss),
        native.addresses(gradients),
        torch.get_num_threads(),
    )


def fwd(p: Problem, *args: Any) -> tuple[Maybe, ...]:
    *tensors, save = args
    loss, gradients = native.empty(()), native.empty_where(p.shapes, save)
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
    return tuple(
        None if g is None else g.to(dtype) for g, dtype in zip(gradients, p.dtypes, strict=True)
    )
