"""Triton kernels: a product whose tiles keep k candidates of each row, their merging, and beams."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.linear_topk import gradient
from mbm_kernels.ops.linear_topk.problem import Problem

TILE = 128  # classes; what is kept has this shape whatever the configuration
MOST = 8  # each one more is a pass over a tile's keys


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("k", 1) > MOST:
        return f"it finds up to {MOST} classes, not {sizes['k']}"
    return triton_launch.why_not(device, dtype)


def fwd(p: Problem, *tensors: Any) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = tensors
    sizes, k = p.sizes, p.k
    R, H, V = sizes["R"], sizes["H"], sizes["V"]
    values = hidden.new_empty(p.out_shape)
    ids = hidden.new_empty(p.out_shape, dtype=torch.int64)
    if R == 0:
        return values, ids
    count = ceil_div(V, TILE)
    keys = hidden.new_empty(R, count, k, dtype=torch.int64)
    maxima, sums = hidden.new_empty(2, R, count, dtype=torch.float32)
    triton_launch.kernel("linear_topk", "tiles")(
        lambda c: (ceil_div(R, c["BLOCK_R"]), count),
        *(hidden, weight, bias, keys, maxima, sums, R, H, V, count),
        *(*hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)),
        dtype=hidden.dtype,
        sizes=sizes,
        K=k,
        BLOCK_V=TILE,
        TF32=hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",  # type: ignore[attr-defined]
    )
    triton_launch.kernel("linear_topk", "merge")(
        lambda _: (R,),
        *(keys, maxima, sums, values, ids, count),
        dtype=hidden.dtype,
        sizes=sizes,
        K=k,
    )
    return values, ids


def select(
    done: Tensor,
    length: Tensor,
    score: Tensor,
    values: Tensor,
    ids: Tensor,
    state: Tensor,
    eos_id: int,
) -> tuple[Tensor, ...]:
    """As beams.by_torch, in one launch; score is float32."""
    B, K, k = values.shape
    H = state.size(-1)
    made = (
        torch.empty_like(length),
        torch.empty_like(done),
        torch.empty_like(length),
        torch.empty_like(score),
        state.new_empty(B, K, H),
        torch.empty_like(length),
    )
    given = (done, length, score, values, ids, state)
    triton_launch.kernel("linear_topk", "select")(
        lambda _: (B, K),
        *(x.contiguous() for x in given),
        *(*made, H, eos_id),
        dtype=values.dtype,
        sizes={"R": B * K, "H": H, "k": k},
        BEAM=K,
        K=k,
        CANDIDATES=power_of_two(K * k),
    )
    return made


bwd = gradient.bwd
