"""Additive (Bahdanau) attention: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels.ops.additive_attention import backend_torch, reference

NAME = "additive_attention"


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, steps, _ = query.shape
    return (
        query.new_empty(batch, steps, value.size(2)),
        query.new_empty(batch, steps, key.size(1)),
    )


def _products(query: Tensor, value: Tensor, **_: Any) -> list[Product]:
    # FLOP counters know no product by a vector: the scores count nothing.
    batch, steps, _features = query.shape
    return [
        product(
            2 * batch * steps * value.size(1) * value.size(2), ("query", "key", "v"), ("value",)
        )
    ]


OP = Op(
    NAME,
    fwd="(Tensor query, Tensor key, Tensor value, Tensor v, Tensor? key_lengths, Tensor? mask)"
    " -> (Tensor context, Tensor weights)",
    bwd="(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor key, Tensor value,"
    " Tensor v, Tensor? key_lengths, Tensor? mask, Tensor weights, bool[] needs)",
    diff=("query", "key", "value", "v"),
    fake=_fake,
    reference=reference.additive_attention,
    torch_fwd=backend_torch.fwd,
    products=_products,
)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention whose scores are v . tanh(query + key), with its weights.

    Equivalent to:
        scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
        weights = scores.softmax(-1)
        context = weights @ value

    Args:
        query: [B, T, D], floating.
        key: [B, S, D].
        value: [B, S, E].
        v: [D].
        key_lengths: int64 [B], 0 <= length <= S; positions at or past the length are not attended.
        mask: bool, True = attend, broadcastable to [B, T, S]; ANDed with the lengths.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        context [B, T, E] and weights [B, T, S], both differentiable. A row with nothing to attend
        to has context 0, weights 0 and gradients 0.

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, lengths or the backend's name do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least; the backward recomputes tanh instead of storing
        [B, T, S, D].

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and
    translate", 2015, section A.1.2.
    """
    checks.tensor(NAME, "query", query, 3)
    checks.tensor(NAME, "key", key, 3)
    checks.tensor(NAME, "value", value, 3)
    checks.tensor(NAME, "v", v, 1)
    batch, steps, features = query.shape
    positions = key.size(1)
    checks.shape(NAME, "key", key, "B, S, D", (batch, positions, features))
    checks.shape(NAME, "value", value, "B, S, E", (batch, positions, value.size(2)))
    checks.shape(NAME, "v", v, "D", (features,))
    if key_lengths is not None:
        checks.lengths(NAME, "key_lengths", key_lengths, batch, positions, "S")
    if mask is not None:
        checks.mask(NAME, "mask", mask, "B, T, S", (batch, steps, positions))
        checks.same_device(NAME, "mask", mask, "query", query)
    query, key, value, v = autocast.cast(query, key, value, v)
    checks.same_floating(NAME, (("query", query), ("key", key), ("value", value), ("v", v)))
    sizes = {"B": batch, "T": steps, "S": positions, "D": features, "E": value.size(2)}
    sizes["elements"] = batch * steps * positions * features
    context, weights = OP(backend, query, key, value, v, key_lengths, mask, sizes=sizes)
    return context, weights
