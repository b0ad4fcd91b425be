"""The Triton kernels of triton_kernels.py: float32 inside, any strides, no host synchronisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.additive_attention.problem import NAME, Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _kernel(name: str) -> triton_launch.Kernel:
    return triton_launch.kernel(NAME, name)


class _Call:
    """A problem with its tensors, whose lengths are on the query's device."""

    def __init__(self, p: Problem, tensors: Sequence[Any]):
        self.p = p
        self.query, self.key, self.value, self.v, lengths, self.mask = tensors
        self.lengths = None if lengths is None else lengths.to(p.device).contiguous()
        self.scored = (self.query, self.key, self.v, self.lengths)
        self.sizes = {"B": p.B, "T": p.T, "S": p.S, "D": p.D, "E": p.E}

    def launch(self, name: str, grid: triton_launch.Grid, *args: Any, **constexprs: Any) -> None:
        _kernel(name)(grid, *args, dtype=self.p.dtype, sizes=self.sizes, **constexprs)

    def score_strides(self) -> tuple[int, ...]:
        return (*self.query.stride(), *self.key.stride(), self.v.stride(0))

    def factors(self, rows_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of query [B, 2, D, T] and key [B, 2, D, S], or features last; flags [B, blocks]."""
        p, new = self.p, self.query.new_empty
        config = _kernel("factors").config(p.dtype, self.sizes)
        blocks = ceil_div(p.D, dict(config.constants)["BLOCK_D"])
        query_factors = new(p.B, 2, p.D, p.T, dtype=torch.float32)
        key_factors = new(p.B, 2, p.D, p.S, dtype=torch.float32)
        direct = new(p.B, blocks, dtype=torch.int32)
        self.launch(
            "factors",
            lambda c: (p.B, ceil_div(p.D, c["BLOCK_D"])),
            *(*self.scored, query_factors, key_factors, direct, p.T, p.S, p.D),
            *self.score_strides(),
            allocated_by=("BLOCK_D",),
            ROWS_FIRST=rows_first,
        )
        return query_factors, key_factors, direct


def fwd(p: Problem, *given: Any) -> tuple[Tensor, Tensor]:
    call = _Call(p, given[:-1])
    query, value = call.query, call.value
    context, weights = query.new_empty(p.context_shape), query.new_empty(p.weights_shape)
    if 0 in (p.B, p.T):
        return context, weights
    way = triton_launch.choice(NAME, "scores", p.dtype, call.sizes)
    factored = way == "factors"
    factors = call.factors(False) if factored else (None, None, None)
    mask = None if call.mask is None else call.mask.expand(p.weights_shape)
    scores = weights if weights.dtype == torch.float32 else torch.empty_like(weights).float()
    blocks = 0 if factors[2] is None else factors[2].size(1)
    call.launch(
        "attend",
        lambda c: (p.B, ceil_div(p.T, c["BLOCK_T"])),
        *(query, call.key, value, call.v, call.lengths, mask, *factors, scores, weights, context),
        *(p.T, p.S, p.D, p.E, *query.stride(), *call.key.stride(), *value.stride()),
        *(call.v.stride(0), *((0, 0, 0) if mask is None else mask.stride())),
        blocks,
        BLOCKS=power_of_two(blocks),
        FACTORS=factored,
        FAST=way == "approximate",
    )
    return context, weights


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    call = _Call(p, tensors)
    grad_context, grad_weights = grads
    weights = saved[0]
    need_query, need_key, need_value, need_v = needs
    found: list[Tensor | None] = [None] * 4
    if p.hiding and grad_context is not None:  # of an empty row it is not read
        grad_context = grad_context.masked_fill((weights == 0).all(-1, keepdim=True), 0)
    if need_value:
        found[2] = (
            torch.zeros_like(call.value)
            if grad_context is None
            else torch.bmm(weights.transpose(1, 2), grad_context)
        )
    if need_query or need_key or need_v:
        by_query, by_key, by_v = _grad_terms(call, grad_context, grad_weights, weights)
        found[0] = by_query.to(p.dtype) if need_query else None
        found[1] = by_key.to(p.dtype) if need_key else None
        found[3] = by_v.to(p.dtype) if need_v else None
    return tuple(found)


def _grad_terms(
    call: _Call, grad_context: Tensor | None, grad_weights: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and v in float32."""
    B, T, S, D, E = call.sizes.values()
    dtype = call.p.dtype

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
    config = _kernel("grad_terms").config(dtype, call.sizes)
    parts = dict(config.constants)["SPLIT"]
    by_query, by_key, by_v = empty(parts, B, T, D), empty(B, S, D), empty(parts, B, D)
    call.launch(
        "grad_terms",
        lambda c: (B, ceil_div(D, c["BLOCK_D"]), c["SPLIT"]),
        *(*call.scored, *factors, gradients, by_query, by_key, by_v, B, T, S, D),
        *call.score_strides(),
        factors[2].size(1),
        allocated_by=("SPLIT",),
        BLOCKS=power_of_two(factors[2].size(1)),
    )
    return by_query[0] if parts == 1 else by_query.sum(0), by_key, by_v.sum((0, 1))
