"""csrc/linear_topk: float32 inside, 16-bit floats cast around it; the packed weight is kept."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native, packing
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.linear_topk import gradient
from mbm_kernels.ops.linear_topk.problem import Problem

MOST = 16  # csrc/linear_topk: kMostTopk


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("k", 1) > MOST:
        return f"it finds up to {MOST} classes, not {sizes['k']}"
    return native.why_not(device, dtype)


def _takes_strided(p: Problem) -> bool:
    """Whether the kernel reads `hidden` as it is, its rows anywhere."""
    return p.dtype is torch.float32 and (p.hidden_strides[1] == 1 or p.sizes["H"] == 1)


def _block(p: Problem) -> bytes:
    stride = p.hidden_strides[0] if _takes_strided(p) else p.sizes["H"]
    values = {**{name: p.sizes[name] for name in "RHVk"}, "hidden_stride": stride}
    return native.block(native.cpu().linear_topk_problem_fields(), values)


def fwd(p: Problem, *tensors: Any) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = tensors
    if not derived(p, "cpu takes strided", _takes_strided):
        hidden = native.dense(hidden)
    bias = native.dense(bias)
    packed = packing.panels(weight)
    values = native.empty(p.out_shape)
    ids = torch.empty(p.out_shape, dtype=torch.int64, device="cpu")
    native.cpu().linear_topk(
        derived(p, "cpu", _block),
        (hidden.data_ptr(), packed.data_ptr(), native.address(bias)),
        (values.data_ptr(), ids.data_ptr()),
        torch.get_num_threads(),
    )
    return values if p.dtype is torch.float32 else values.to(p.dtype), ids


bwd = gradient.bwd
