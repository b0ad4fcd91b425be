"""Scaled dot-product attention with its weights: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Calls, Checked
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.cross_attention import backend_torch, reference
from mbm_kernels.ops.cross_attention.saved import empty_saved

NAME = "cross_attention"
NEED_WEIGHTS = (None, "mean", "heads")


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, steps, _ = query.shape
    shapes = {
        None: (0,),
        "mean": (batch, steps, key.size(2)),
        "heads": (batch, heads, steps, key.size(2)),
    }
    return (
        query.new_empty(batch, heads, steps, value.size(3)),
        query.new_empty(shapes[need_weights]),
        empty_saved(query, key, value, need_weights, save),
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
)
_calls: Calls[Checked] = Calls()
_remembered = checks.Remembered()


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
) -> Tensor | tuple[Tensor, Tensor]:
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
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    kind = (backend, scale, need_weights, mask is None)
    # The values of lengths are checked each time.
    if key_lengths is None and (call := _calls.get(tensors, kind)):
        both = OP.run(call, (query, key, value, None, mask))
        return both[0] if need_weights is None else both  # type: ignore[no-any-return]
    known = _remembered.key(query, key, value)
    found = _remembered.get(known)
    sizes = _check_shapes(query, key, value) if found is None else found
    checks.choice(NAME, "need_weights", need_weights, NEED_WEIGHTS)
    if scale is None:
        scale = max(sizes["D"], 1) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        expected = "None or a number"
        checks.fail(NAME, "scale", checks.describe(scale), expected, "scale the query", TypeError)
    if key_lengths is not None:
        checks.lengths(NAME, "key_lengths", key_lengths, sizes["B"], sizes["S"], "S", query)
    if mask is not None:
        shape = (sizes["B"], sizes["N"], sizes["T"], sizes["S"])
        checks.mask(NAME, "mask", mask, "B, N, T, S", shape, floating=True)
        checks.same_device(NAME, "mask", mask, "query", query)
    query, key, value, mask = autocast.cast(query, key, value, mask)
    added = mask if mask is not None and mask.is_floating_point() else None
    if found is None or added is not None:
        named = (("query", query), ("key", key), ("value", value), ("mask", added))
        checks.same_floating(NAME, named)
        _remembered.put(known, sizes)
    sizes["weights"] = int(need_weights is not None)
    sizes["masked"] = int(mask is not None or key_lengths is not None)
    if key_lengths is None:
        options = (float(scale), need_weights)
        checked = Checked(options, query.device, query.dtype, dict(sizes))
        _calls.remember(checked, backend, tensors, kind)
    context, weights = OP(
        backend, query, key, value, key_lengths, mask, float(scale), need_weights, sizes=sizes
    )
    return context if need_weights is None else (context, weights)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    checks.tensor(NAME, "query", query, 4)
    checks.tensor(NAME, "key", key, 4)
    checks.tensor(NAME, "value", value, 4)
    B, N, T, D = query.shape
    S, E = key.size(2), value.size(3)
    checks.shape(NAME, "key", key, "B, N, S, D", (B, N, S, D))
    checks.shape(NAME, "value", value, "B, N, S, E", (B, N, S, E))
    return {"B": B, "N": N, "T": T, "S": S, "D": D, "E": E, "elements": B * N * T * S * D}
