"""The Triton kernels of triton_kernels.py: float32 inside, any strides, no host synchronisation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.additive_attention import problem
from mbm_kernels.ops.additive_attention.problem import NAME, Problem

PADDING = 16  # of queries, ROW_PADDING of the kernels


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _kernel(name: str) -> triton_launch.Kernel:
    return triton_launch.kernel(NAME, name)


class PreparedKey(NamedTuple):
    """What the kernels read of a key, float32."""

    powers: Tensor  # [B, 2, D made even, S]: e^2k, expm1(2k)
    sizes: Tensor  # [B, S]: the largest |k|


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

    def powers(self, of_queries: bool = True, of_keys: bool = True) -> tuple[Tensor | None, ...]:
        """Powers and sizes of the queries, then of the keys; None for what is not asked for."""
        p, new = self.p, self.v.new_empty
        T, S, even = p.T if of_queries else 0, p.S if of_keys else 0, p.D + p.D % 2
        padded = ceil_div(T, PADDING) * PADDING
        found: list[Tensor | None] = [None] * 4
        if of_queries:
            found[0] = new(p.B, even // 2, padded, 3, 2, dtype=torch.float32)
            found[1] = new(p.B, T, dtype=torch.float32)
        if of_keys:
            found[2] = new(p.B, 2, even, S, dtype=torch.float32)
            found[3] = new(p.B, S, dtype=torch.float32)
        self.launch(
            "powers",
            lambda c: (p.B, ceil_div(S, c["BLOCK_R"]) + ceil_div(T, c["BLOCK_R"])),
            *(self.query, self.key, self.v, *found, T, S, p.D, *self.score_strides()),
        )
        return tuple(found)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of query [B, 2, T, D] and key [B, 2, S, D]; flags [B, blocks]."""
        p, new = self.p, self.query.new_empty
        config = _kernel("factors").config(p.dtype, self.sizes)
        blocks = ceil_div(p.D, dict(config.constants)["BLOCK_D"])
        query_factors = new(p.B, 2, p.T, p.D, dtype=torch.float32)
        key_factors = new(p.B, 2, p.S, p.D, dtype=torch.float32)
        direct = new(p.B, blocks, dtype=torch.int32)
        self.launch(
            "factors",
            lambda c: (p.B, ceil_div(p.D, c["BLOCK_D"])),
            *(*self.scored, query_factors, key_factors, direct, p.T, p.S, p.D),
            *self.score_strides(),
            allocated_by=("BLOCK_D",),
        )
        return query_factors, key_factors, direct


def fwd(p: Problem, *given: Any) -> tuple[Tensor, Tensor]:
    call = _Call(p, given[:-1])
    way = triton_launch.choice(NAME, "scores", p.dtype, call.sizes)
    powers = call.powers() if way == "powers" and 0 not in (p.B, p.T) else (None,) * 4
    return _attend(call, powers, way == "approximate")


def prepare_key(key: Tensor) -> PreparedKey:
    """key [B, S, D], which `fwd_prepared` is given beside it: it reads both."""
    nothing = key.new_empty(key.size(0), 0, key.size(2))
    p = problem.build(nothing, key, key, key.new_empty(key.size(2)), None, None)
    call = _Call(p, (nothing, key, key, key.new_empty(key.size(2)), None, None))
    *_, powers, sizes = call.powers(of_queries=False)
    assert powers is not None
    assert sizes is not None
    return PreparedKey(powers, sizes)


def fwd_prepared(
    p: Problem, tensors: Sequence[Any], prepared: PreparedKey
) -> tuple[Tensor, Tensor]:
    """`prepared` is what `prepare_key` made of the key, so that one query uses it too."""
    call = _Call(p, tensors)
    powers = call.powers(of_keys=False) if 0 not in (p.B, p.T) else (None,) * 4
    return _attend(call, (*powers[:2], *prepared), False)


def _attend(call: _Call, powers: tuple[Tensor | None, ...], fast: bool) -> tuple[Tensor, Tensor]:
    p, query, value = call.p, call.query, call.value
    context, weights = query.new_empty(p.context_shape), query.new_empty(p.weights_shape)
    if 0 in (p.B, p.T):
        return context, weights
    mask = None if call.mask is None else call.mask.expand(p.weights_shape)
    scores = weights
    if weights.dtype != torch.float32:
        scores = weights.new_empty(p.weights_shape, dtype=torch.float32)
    call.launch(
        "attend",
        lambda c: (p.B, ceil_div(p.T, c["BLOCK_T"])),
        *(query, call.key, value, call.v, call.lengths, mask, *powers, scores, weights, context),
        *(p.T, p.S, p.D, p.E, *query.stride(), *call.key.stride(), *value.stride()),
        *(call.v.stride(0), *((0, 0, 0) if mask is None else mask.stride())),
        FAST=fast,
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
    factors = call.factors()
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
