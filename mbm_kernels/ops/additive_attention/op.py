"""Additive (Bahdanau) attention: the public function and its registration."""

from typing import Any

from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Calls, Checked
from mbm_kernels._core.spec import Spec
from mbm_kernels._core.tracing import is_plain, wants_gradient
from mbm_kernels.ops.additive_attention import backend_torch, reference
from mbm_kernels.ops.additive_attention.keys import AdditiveAttentionKeys

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
    Spec(
        NAME,
        inputs="Tensor query, Tensor key, Tensor value, Tensor v, Tensor?"
        " key_lengths, Tensor? mask",
        outputs=("context", "weights"),
        saved=("weights",),
        differentiable=("query", "key", "value", "v"),
    ),
    fake=_fake,
    reference=reference.additive_attention,
    torch_fwd=backend_torch.fwd,
    products=_products,
)
_calls: Calls[Checked] = Calls()


def additive_attention(
    query: Tensor,
    key: Tensor | AdditiveAttentionKeys,
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
        key: [B, S, D]; or what `additive_attention_keys` made of one, where no gradient is wanted.
        value: [B, S, E].
        v: [D].
        key_lengths: int64 [B], 0 <= length <= S; positions at or past the length are not attended.
            Lengths are compared with S where their values can be looked at, on the CPU in eager
            mode; elsewhere values outside 0..S count as the nearer of the two.
        mask: bool, True = attend, broadcastable to [B, T, S]; ANDed with the lengths.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        context [B, T, E] and weights [B, T, S], both differentiable. A row with nothing to attend
        to has context 0, weights 0 and gradients 0. What is hidden is not read: a NaN there
        reaches no result (README.md says where plain torch on a GPU falls short of this).

    Raises:
        TypeError: an argument is not a tensor of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, devices, lengths or the backend's name do not fit, or a gradient is
            wanted and key is AdditiveAttentionKeys.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least; the backward recomputes tanh instead of storing
        [B, T, S, D].

    Source: Bahdanau, Cho, Bengio, "Neural machine translation by jointly learning to align and
    translate", 2015, section A.1.2.
    """
    tensors: Any = (query, key, value, v) if mask is None else (query, key, value, v, mask)
    kind = (backend, mask is None)
    # The values of lengths are checked each time.
    if key_lengths is None and (call := _calls.get(tensors, kind)):
        return OP.run(call, (query, key, value, v, None, mask))  # type: ignore[no-any-return]
    checks.tensor(NAME, "query", query, 3)
    given = key._snapshot if isinstance(key, AdditiveAttentionKeys) else key
    checks.tensor(NAME, "key", given, 3)
    checks.tensor(NAME, "value", value, 3)
    checks.tensor(NAME, "v", v, 1)
    batch, steps, features = query.shape
    positions = given.size(1)
    checks.shape(NAME, "key", given, "B, S, D", (batch, positions, features))
    checks.shape(NAME, "value", value, "B, S, E", (batch, positions, value.size(2)))
    checks.shape(NAME, "v", v, "D", (features,))
    if key_lengths is not None:
        checks.lengths(NAME, "key_lengths", key_lengths, batch, positions, "S", query)
    if mask is not None:
        checks.mask(NAME, "mask", mask, "B, T, S", (batch, steps, positions))
        checks.same_device(NAME, "mask", mask, "query", query)
    sizes = {"B": batch, "T": steps, "S": positions, "D": features, "E": value.size(2)}
    sizes["elements"] = batch * steps * positions * features
    if isinstance(key, AdditiveAttentionKeys):
        for name, tensor in (("query", query), ("value", value), ("v", v)):
            if wants_gradient(tensor):
                got = f"AdditiveAttentionKeys where a gradient by {name} is wanted"
                remedy = "pass the key itself, or call under torch.no_grad()"
                checks.fail(NAME, "key", got, "a tensor: keys are a snapshot", remedy)
        query, value, v = autocast.cast(query, value, v)
        if _serves(key, query, value, v, key_lengths, mask, backend, sizes):
            run = dispatch.load_backend(NAME, key.backend).fwd
            context, weights = run(query, given, value, v, key_lengths, mask, key._prepared)
            return context, weights
        given = key.key()
        (given,) = autocast.cast(given)
    else:
        query, given, value, v = autocast.cast(query, key, value, v)
    checks.same_floating(NAME, (("query", query), ("key", given), ("value", value), ("v", v)))
    if key_lengths is None and given is key:
        checked = Checked((), query.device, query.dtype, dict(sizes))
        _calls.remember(checked, backend, tensors, kind)
    context, weights = OP(backend, query, given, value, v, key_lengths, mask, sizes=sizes)
    return context, weights


def _serves(
    keys: AdditiveAttentionKeys,
    query: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    backend: str,
    sizes: dict[str, int],
) -> bool:
    """Whether the call may be given what the keys have prepared."""
    if keys._prepared is None:
        return False
    tensors = (query, value, v)
    if any(x.dtype != keys.dtype or x.device != keys.device for x in tensors):
        return False
    if not is_plain([x for x in (*tensors, key_lengths, mask) if x is not None]):
        return False
    sizes["training"] = 0
    return dispatch.select(NAME, backend, keys.device, keys.dtype, sizes) == keys.backend
