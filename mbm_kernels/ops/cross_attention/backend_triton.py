"""The Triton kernels of triton_kernels.py: exact softmax, any strides, no host synchronisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.cross_attention.problem import NAME, Problem

# Up to this many positions a program holds the scores of its queries in registers; a float32
# product with them needs both operands in registers too.
MOST_POSITIONS = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
# What longer rows are cut into.
POSITIONS = 64
# Up to this many queries one program holds all of a head's, and the backward is one kernel.
MOST_QUERIES = 32


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


class _Call:
    """A problem with its tensors, whose lengths are on the query's device."""

    def __init__(self, p: Problem, tensors: Sequence[Any]):
        self.p = p
        self.query, self.key, self.value, lengths, mask = tensors
        self.lengths = None if lengths is None else lengths.to(p.device).contiguous()
        self.mask = None if mask is None else mask.expand(p.heads_shape)
        self.widest = max(p.D, p.E)
        self.block_t = min(max(power_of_two(p.T), 16), MOST_QUERIES)
        self.sizes = {"T": p.T, "S": p.S, "widest": self.widest}

    def launch(self, name: str, grid: triton_launch.Grid, *args: Any, **constexprs: Any) -> None:
        kernel = triton_launch.kernel(NAME, name)
        kernel(grid, *args, dtype=self.p.dtype, sizes=self.sizes, **constexprs)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.query.new_empty(shape, dtype=dtype)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def fwd(p: Problem, *given: Any) -> tuple[Tensor | None, ...]:
    *tensors, save = given
    call = _Call(p, tensors)
    query, key, value = call.query, call.key, call.value
    B, N, T, S, D, E = *p.heads_shape, p.D, p.E
    context = call.empty(B, N, T, E)
    weights = heads = saved = None
    if save and p.saves_heads:
        saved = heads = call.empty(B, N, T, S, dtype=torch.float32)
    if p.need_weights == "heads":
        weights = heads = call.empty(B, N, T, S)
    elif p.need_weights == "mean":
        weights = call.empty(B, T, S)
    if B * T == 0:
        return context, weights, saved
    if N == 0:  # as the mean over nothing in torch
        return context, None if weights is None else weights.fill_(float("nan")), saved
    mean = p.need_weights == "mean"
    rows = call.empty(2, B * N, T, dtype=torch.float32) if mean else None
    whole = MOST_POSITIONS[p.dtype] >= S
    call.launch(
        "attend",
        lambda c: (B * N, ceil_div(T, call.block_t), max(ceil_div(E, c["BLOCK_E"]), 1)),
        *(query, key, value, call.lengths, call.mask, context, heads, rows),
        *(N, T, S, D, E, p.scale, *query.stride(), *key.stride(), *value.stride()),
        *_strides(call.mask),
        WHOLE=whole,
        BLOCK_T=call.block_t,
        BLOCK_S=max(power_of_two(S), 16) if whole else POSITIONS,
    )
    if mean:
        call.launch(
            "mean_weights",
            lambda c: (B, ceil_div(T, call.block_t), ceil_div(S, c["BLOCK_S"])),
            *(query, key, call.lengths, call.mask, rows, weights),
            *(B, N, T, S, D, p.scale, *query.stride(), *key.stride(), *_strides(call.mask)),
            BLOCK_T=call.block_t,
        )
    return context, weights, saved


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call, mask = _Call(p, tensors), tensors[4]
    B, N, T, S = p.heads_shape
    found = [torch.empty_like(x) for x in tensors[:3]]
    grad_mask = None
    if mask is not None and needs[3]:
        grad_mask = call.empty(B, N, T, S, dtype=torch.float32)
    if B * N * T == 0:
        found = [torch.zeros_like(x) for x in found]
    else:
        heads = saved[0] if p.need_weights == "heads" else saved[1]
        grad_context, grad_weights = grads
        if p.need_weights is None:
            grad_weights = None
        if grad_weights is not None:
            if p.need_weights == "mean":
                grad_weights = grad_weights.unsqueeze(1)
            grad_weights = grad_weights.expand(B, N, T, S)
        kept = heads.contiguous() if heads is not None and heads.dim() == 4 else None
        _gradients(call, (grad_context, grad_weights), kept, found, grad_mask)
    by_mask = None
    if grad_mask is not None:
        by_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype)
    found_or_none = (g if need else None for g, need in zip(found, needs, strict=False))
    return *found_or_none, by_mask


def _gradients(
    call: _Call,
    grads: tuple[Tensor | None, Tensor | None],
    heads: Tensor | None,
    found: Sequence[Tensor],
    grad_mask: Tensor | None,
) -> None:
    """Fills `found`, of query, key and value, and grad_mask, float32 [B, N, T, S]."""
    p = call.p
    B, N, T, S, D, E = *p.heads_shape, p.D, p.E
    by_query, by_key, by_value = found
    share = 1 / N if p.need_weights == "mean" and grads[1] is not None else 1.0
    owns = call.block_t >= T
    rows = None if owns else call.empty(3, B * N, T, dtype=torch.float32)
    given = (call.query, call.key, call.value, call.lengths, call.mask, heads)
    sizes = (N, T, S, D, E, p.scale, share)
    strides = (
        *(*_strides(grads[0]), *_strides(grads[1])),
        *(*call.query.stride(), *call.key.stride(), *call.value.stride(), *_strides(call.mask)),
    )
    call.launch(
        "grad_queries",
        lambda c: (B * N, ceil_div(T, call.block_t), max(ceil_div(call.widest, c["BLOCK_D"]), 1)),
        *(*grads, *given, by_query),
        *((by_key, by_value) if owns else (None, None)),
        *(grad_mask, rows, *sizes, *strides),
        *(*by_query.stride(), *by_key.stride(), *by_value.stride()),
        OWNS_T=owns,
        BLOCK_T=call.block_t,
    )
    if owns:
        return
    call.launch(
        "grad_keys",
        lambda c: (B * N, ceil_div(S, c["BLOCK_S"]), max(ceil_div(call.widest, c["BLOCK_D"]), 1)),
        *(*grads, *given, by_key, by_value, rows, *sizes, *strides),
        *(*by_key.stride(), *by_value.stride()),
        BLOCK_T=call.block_t,
    )
