"""The Triton kernels of triton_kernels.py: exact softmax, any strides, no host synchronisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.cross_attention.saved import empty_saved

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
    """Sizes and strides that all kernels share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ):
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.lengths = None if key_lengths is None else key_lengths.to(query.device).contiguous()
        self.B, self.N, self.T, self.D = query.shape
        self.S, self.E = value.shape[2:]
        self.mask = None if mask is None else mask.expand(self.B, self.N, self.T, self.S)
        self.widest = max(self.D, self.E)
        self.block_t = min(max(power_of_two(self.T), 16), MOST_QUERIES)
        self.sizes = {"T": self.T, "S": self.S, "widest": self.widest}

    def launch(self, name: str, grid: triton_launch.Grid, *args: Any, **constexprs: Any) -> None:
        kernel = triton_launch.kernel("cross_attention", name)
        kernel(grid, *args, dtype=self.query.dtype, sizes=self.sizes, **constexprs)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.query.new_empty(shape, dtype=dtype)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, key_lengths, mask, scale)
    B, N, T, S, D, E = call.B, call.N, call.T, call.S, call.D, call.E
    context = call.empty(B, N, T, E)
    saved = empty_saved(query, key, value, need_weights, save)
    heads = saved if saved.dim() == 4 else None
    weights = call.empty(0)
    if need_weights == "heads":
        weights = heads = call.empty(B, N, T, S)
    elif need_weights == "mean":
        weights = call.empty(B, T, S)
    if B * T == 0:
        return context, weights, saved
    if N == 0:
        return context, weights.fill_(float("nan")), saved  # as the mean over nothing in torch
    mean = need_weights == "mean"
    rows = call.empty(2, B * N, T, dtype=torch.float32) if mean else None
    whole = MOST_POSITIONS[query.dtype] >= S
    call.launch(
        "attend",
        lambda c: (B * N, ceil_div(T, call.block_t), max(ceil_div(E, c["BLOCK_E"]), 1)),
        *(query, key, value, call.lengths, call.mask, context, heads, rows),
        *(N, T, S, D, E, scale, *query.stride(), *key.stride(), *value.stride()),
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
            *(B, N, T, S, D, scale, *query.stride(), *key.stride(), *_strides(call.mask)),
            BLOCK_T=call.block_t,
        )
    return context, weights, saved


def bwd(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    weights: Tensor,
    saved: Tensor,
    scale: float,
    need_weights: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call = _Call(query, key, value, key_lengths, mask, scale)
    B, N, T, S = call.B, call.N, call.T, call.S
    found = [torch.empty_like(x) for x in (query, key, value)]
    grad_mask = None
    if mask is not None and needs[3]:
        grad_mask = call.empty(B, N, T, S, dtype=torch.float32)
    if B * N * T == 0:
        found = [torch.zeros_like(x) for x in found]
    else:
        heads = weights if need_weights == "heads" else saved
        share = 1.0
        if need_weights is None:
            grad_weights = None
        if grad_weights is not None:
            if need_weights == "mean":
                share, grad_weights = 1 / N, grad_weights.unsqueeze(1)
            grad_weights = grad_weights.expand(B, N, T, S)
        kept = heads.contiguous() if heads.dim() == 4 else None
        _gradients(call, grad_context, grad_weights, share, kept, found, grad_mask)
    by_mask = None
    if grad_mask is not None and mask is not None:
        by_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype)
    grads = (g if need else None for g, need in zip(found, needs, strict=False))
    return *grads, by_mask


def _gradients(
    call: _Call,
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    share: float,
    heads: Tensor | None,
    found: Sequence[Tensor],
    grad_mask: Tensor | None,
) -> None:
    """Fills `found`, of query, key and value, and grad_mask, float32 [B, N, T, S]."""
    B, N, T, S, D, E = call.B, call.N, call.T, call.S, call.D, call.E
    by_query, by_key, by_value = found
    owns = call.block_t >= T
    rows = None if owns else call.empty(3, B * N, T, dtype=torch.float32)
    given = (call.query, call.key, call.value, call.lengths, call.mask, heads)
    sizes = (N, T, S, D, E, call.scale, share)
    strides = (
        *(*_strides(grad_context), *_strides(grad_weights)),
        *(*call.query.stride(), *call.key.stride(), *call.value.stride(), *_strides(call.mask)),
    )
    call.launch(
        "grad_queries",
        lambda c: (B * N, ceil_div(T, call.block_t), max(ceil_div(call.widest, c["BLOCK_D"]), 1)),
        *(grad_context, grad_weights, *given, by_query),
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
        *(grad_context, grad_weights, *given, by_key, by_value, rows, *sizes, *strides),
        *(*by_key.stride(), *by_value.stride()),
        BLOCK_T=call.block_t,
    )
