"""Scaled dot-product attention with its weights: the public function and its registration."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, masks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.cross_attention import backend_torch, problem, reference
from mbm_kernels.ops.cross_attention.problem import NAME, NEED_WEIGHTS, PROBLEMS, Problem

Tensors = tuple[Any, ...]  # query, key, value, key_lengths, mask
Results = Tensor | tuple[Tensor, Tensor]


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, save = args[0], args[-1]
    p = problem.find(*args[:-1])
    saved = p.heads_shape if save and p.saves_heads else (0,)
    return (
        query.new_empty(p.context_shape),
        query.new_empty((0,) if p.need_weights is None else p.weights_shape),
        query.new_empty(saved, dtype=torch.float32),
    )


def _products(
    query: Tensor, key: Tensor, value: Tensor, need_weights: str | None, **_: Any
) -> list[Product]:
    scores, context = 2 * query.numel() * key.size(2), 2 * value.numel() * query.size(2)
    if need_weights is None:
        # As torch counts scaled_dot_product_attention on a GPU (on a CPU it counts nothing): the
        # backward makes all gradients, and the scores again.
        backward = 3 * scores + 2 * context
        return [Product(scores + context, ((backward, ("query", "key", "value", "mask")),))]
    return [
        product(scores, ("query",), ("key",)),
        product(context, ("query", "key", "mask"), ("value",)),
    ]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? mask",
        options="float scale, str? need_weights",
        outputs=("context", "weights"),
        state=("saved",),
        saved=("weights", "saved"),
        differentiable=("query", "key", "value", "mask"),
        save="any",
    ),
    fake=_fake,
    reference=reference.cross_attention,
    torch_fwd=backend_torch.fwd,
    products=_products,
    problem=problem.find,
)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: str | None = None,
    backend: str = "auto",
) -> Results:
    """Attention whose scores are scale * query . key, optionally with its weights.

    Equivalent to:
        weights = (scale * query @ key.transpose(-1, -2) + mask).softmax(-1)
        context = weights @ value

    Args:
        query: [B, N, T, D], floating; N heads.
        key: [B, N, S, D].
        value: [B, N, S, E].
        key_lengths: int64 [B], 0 <= length <= S; positions at or past the length are not attended.
            Lengths are compared with S where their values can be looked at, on the CPU in eager
            mode; elsewhere values outside 0..S count as the nearer of the two.
        mask: broadcastable to [B, N, T, S]: bool, True = attend, or of the query's dtype, added to
            the scores (and differentiable; -inf hides a position). Applied with the lengths.
        scale: of the scores; None = 1 / sqrt(D).
        need_weights: None, "mean" (over the heads) or "heads".
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        context [B, N, T, E] if `need_weights` is None; (context, weights [B, T, S]) for "mean";
        (context, weights [B, N, T, S]) for "heads"; all differentiable. A row with nothing to
        attend to has context 0, weights 0 and gradients 0. What is hidden (by a length, False or
        -inf) is not read: a NaN there reaches no result (README.md says where plain torch on a GPU
        falls short of this).

    Raises:
        TypeError: an argument is not of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, lengths or names do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least. A large finite mask, -1e9 say, is added to the
        scores as it is: what rounding leaves of them decides, as in the expression above, forward
        and backward. Converted to float16 it is -inf, and hides. The torch backend without weights
        is torch's scaled_dot_product_attention, except for gradients under such a mask; its fused
        forms have no second derivative and say so. With weights every order of derivative exists.

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.2.1.
    """
    tensors: Tensors = (query, key, value, key_lengths, mask)
    given = tensors[:3]
    if key_lengths is not None or mask is not None:
        given = (*given, *(t for t in tensors[3:] if t is not None))
    kind = (backend, scale, need_weights, key_lengths is None, mask is None)
    call = PROBLEMS.call(given, kind)
    if call is not None:
        masks.check_lengths(NAME, key_lengths, call.problem.S)
        both = OP.run(call, tensors)
        return both[0] if need_weights is None else both  # type: ignore[no-any-return]
    if tracing.takes_over(given):
        return tracing.deferred(cross_attention, locals())  # type: ignore[no-any-return]
    checked, found = PROBLEMS.checked(tensors, (scale, need_weights), _checked)
    masks.check_lengths(NAME, key_lengths, found.S)
    both = OP.run_first(PROBLEMS, found, (backend, given, kind), checked)
    return both[0] if need_weights is None else both  # type: ignore[no-any-return]


def _checked(tensors: Tensors, options: tuple[Any, ...]) -> tuple[Tensors, Problem]:
    """The tensors as autocast wants them and their problem; raises for what does not fit."""
    scale, need_weights = options
    problem.check_shapes(*tensors[:3])
    checks.choice(NAME, "need_weights", need_weights, NEED_WEIGHTS)
    if scale is None:
        scale = max(tensors[0].size(3), 1) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        expected = "None or a number"
        checks.fail(NAME, "scale", checks.describe(scale), expected, "scale the query", TypeError)
    problem.check_hiding(*tensors[:2], *tensors[3:])
    masks.check_lengths(NAME, tensors[3], tensors[1].size(2))
    tensors = autocast.cast(*tensors)
    query, key, value, _, mask = tensors
    added = mask if mask is not None and mask.is_floating_point() else None
    named = (("query", query), ("key", key), ("value", value), ("mask", added))
    checks.same_floating(NAME, named)
    return tensors, problem.build(*tensors, float(scale), need_weights)
