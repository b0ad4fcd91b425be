"""csrc/linear_topk: float32 inside, 16-bit floats cast around it; the packed weight is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native, packing
from mbm_kernels.ops.linear_topk import gradient

MOST = 16  # csrc/linear_topk: kMostTopk


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("k", 1) > MOST:
        return f"it finds up to {MOST} classes, not {sizes['k']}"
    return native.why_not(device, dtype)


def fwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    rows, features = hidden.shape
    dtype = hidden.dtype
    hidden = hidden.to(torch.float32)
    if hidden.stride(1) != 1 and features != 1:
        hidden = hidden.contiguous()
    bias = native.dense(bias)
    packed = packing.panels(weight)
    values = native.empty((rows, k))
    ids = torch.empty((rows, k), dtype=torch.int64, device="cpu")
    native.cpu().linear_topk(
        (rows, features, weight.size(0), k),
        hidden.data_ptr(),
        hidden.stride(0),
        packed.data_ptr(),
        native.address(bias),
        values.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return values.to(dtype), ids


def bwd(
    grad_values: Tensor | None,
    grad_ids: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    k: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return gradient.bwd(grad_values, hidden, weight, bias, ids, needs)
