"""The Triton kernels of triton_kernels.py: float32 inside, any strides, no host synchronisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


NAME = "additive_attention"


def _kernel(name: str) -> triton_launch.Kernel:
    return triton_launch.kernel(NAME, name)


class _Call:
    """Sizes, strides and factors that forward and backward share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, v: Tensor, key_lengths: Tensor | None
    ):
        self.query, self.key, self.value, self.v = query, key, value, v
        self.lengths = None if key_lengths is None else key_lengths.to(query.device).contiguous()
        self.B, self.T, self.D = query.shape
        self.S, self.E = value.shape[1:]
        self.sizes = {"B": self.B, "T": self.T, "S": self.S, "D": self.D, "E": self.E}

    def launch(self, name: str, grid: triton_launch.Grid, *args: Any, **constexprs: Any) -> None:
        _kernel(name)(grid, *args, dtype=self.query.dtype, sizes=self.sizes, **constexprs)

    def factors(self, rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of query [B, 2, D, T] and key [B, 2, D, S], or features last; flags [B, blocks]."""
        new = self.query.new_empty
        config = _kernel("factors").config(self.query.dtype, self.sizes)
        blocks = ceil_div(self.D, dict(config.constants)["BLOCK_D"])
        query_factors = new(self.B, 2, self.D, self.T, dtype=torch.float32)
        key_factors = new(self.B, 2, self.D, self.S, dtype=torch.float32)
        direct = new(self.B, blocks, dtype=torch.int32)
        self.launch(
            "factors",
            lambda c: (self.B, ceil_div(self.D, c["BLOCK_D"])),
            *(self.query, self.key, self.v, self.lengths, query_factors, key_factors, direct),
            *(self.T, self.S, self.D),
            *(*self.query.stride(), *self.key.stride(), self.v.stride(0)),
            allocated_by=("BLOCK_D",),
            ROWS_FIRST=rows_first,
        )
        return query_factors, key_factors, direct


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = _Call(query, key, value, v, key_lengths)
    B, T, S, D, E = call.sizes.values()
    context, weights = query.new_empty(B, T, E), query.new_empty(B, T, S)
    if 0 in (B, T):
        return context, weights
    way = triton_launch.choice(NAME, "scores", query.dtype, call.sizes)
    factored = way == "factors"
    factors = call.factors(False) if factored else (None, None, None)
    if mask is not None:
        mask = mask.expand(B, T, S)
    scores = weights if weights.dtype == torch.float32 else torch.empty_like(weights).float()
    blocks = 0 if factors[2] is None else factors[2].size(1)
    call.launch(
        "attend",
        lambda c: (B, ceil_div(T, c["BLOCK_T"])),
        *(query, key, value, v, call.lengths, mask, *factors, scores, weights, context),
        *(T, S, D, E, *query.stride(), *key.stride(), *value.stride(), v.stride(0)),
        *((0, 0, 0) if mask is None else mask.stride()),
        blocks,
        BLOCKS=power_of_two(blocks),
        FACTORS=factored,
        FAST=way == "approximate",
    )
    return context, weights


def bwd(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    weights: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call = _Call(query, key, value, v, key_lengths)
    need_query, need_key, need_value, need_v = needs
    found: list[Tensor | None] = [None] * 4
    hides = mask is not None or key_lengths is not None
    if hides and grad_context is not None:  # of an empty row it is not read
        grad_context = grad_context.masked_fill((weights == 0).all(-1, keepdim=True), 0)
    if need_value:
        found[2] = (
            torch.zeros_like(value)
            if grad_context is None
            else torch.bmm(weights.transpose(1, 2), grad_context)
        )
    if need_query or need_key or need_v:
        by_query, by_key, by_v = _grad_terms(call, grad_context, grad_weights, weights)
        found[0] = by_query.to(query.dtype) if need_query else None
        found[1] = by_key.to(query.dtype) if need_key else None
        found[3] = by_v.to(query.dtype) if need_v else None
    return tuple(found)


def _grad_terms(
    call: _Call, grad_context: Tensor | None, grad_weights: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and v in float32."""
    B, T, S, D, E = call.sizes.values()

    def empty(*shape: int) -> Tensor:
        return call.query.new_empty(shape, dtype=torch.float32)

    if 0 in (B, T, S, D):
        return empty(B, T, D).zero_(), empty(B, S, D).zero_(), empty(D).zero_()
    gradients = empty(B, T, S)
    call.launch(
        "grad_scores",
        lambda c: (B, ceil_div(T, c["BLOCK_T"])),
        *(grad_context, grad_weights, call.value, weights.contiguous(), call.lengths, gradients),
        *(T, S, E),
        *((0, 0, 0) if grad_context is None else grad_context.stride()),
        *((0, 0, 0) if grad_weights is None else grad_weights.stride()),
        *call.value.stride(),
    )
    factors = call.factors(True)
    config = _kernel("grad_terms").config(call.query.dtype, call.sizes)
    parts = dict(config.constants)["SPLIT"]
    by_query, by_key, by_v = empty(parts, B, T, D), empty(B, S, D), empty(parts, B, D)
    call.launch(
        "grad_terms",
        lambda c: (B, ceil_div(D, c["BLOCK_D"]), c["SPLIT"]),
        *(call.query, call.key, call.v, call.lengths, *factors, gradients),
        *(by_query, by_key, by_v, B, T, S, D),
        *(*call.query.stride(), *call.key.stride(), call.v.stride(0)),
        factors[2].size(1),
        allocated_by=("SPLIT",),
        BLOCKS=power_of_two(factors[2].size(1)),
    )
    return by_query[0] if parts == 1 else by_query.sum(0), by_key, by_v.sum((0, 1))
