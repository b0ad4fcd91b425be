"""Additive (Bahdanau) attention: the public function and its registration."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch, masks, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Call
from mbm_kernels._core.spec import Spec
from mbm_kernels._core.tracing import is_plain, wants_gradient
from mbm_kernels.ops.additive_attention import backend_torch, problem, reference
from mbm_kernels.ops.additive_attention.keys import AdditiveAttentionKeys
from mbm_kernels.ops.additive_attention.problem import NAME, PROBLEMS, Problem

Tensors = tuple[Any, ...]  # query, key, value, v, key_lengths, mask
Results = tuple[Tensor, Tensor]


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, steps, _features = query.shape
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
        save="any",
    ),
    fake=_fake,
    reference=reference.additive_attention,
    torch_fwd=backend_torch.fwd,
    products=_products,
    problem=problem.find,
)


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
    if isinstance(key, AdditiveAttentionKeys):
        return _attend_to_keys(key, (query, key._snapshot, value, v, key_lengths, mask), backend)
    return _attend((query, key, value, v, key_lengths, mask), backend)


def _attend(tensors: Tensors, backend: str) -> Results:
    given, kind = _kind(tensors, backend, False)
    call = PROBLEMS.call(given, kind)
    if call is not None:
        masks.check_lengths(NAME, tensors[4], call.problem.S)
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    if tracing.takes_over(given):
        names = ("query", "key", "value", "v", "key_lengths", "mask")
        local = {**dict(zip(names, tensors, strict=True)), "backend": backend}
        return tracing.deferred(additive_attention, local)  # type: ignore[no-any-return]
    checked, found = PROBLEMS.checked(tensors, (), _checked)
    masks.check_lengths(NAME, checked[4], found.S)
    return OP.run_first(PROBLEMS, found, (backend, given, kind), checked)  # type: ignore[no-any-return]


def _checked(tensors: Tensors, options: tuple[()]) -> tuple[Tensors, Problem]:
    """The tensors as autocast wants them and their problem; raises for what does not fit."""
    problem.check(*tensors)
    masks.check_lengths(NAME, tensors[4], tensors[1].size(1))
    tensors = autocast.cast(*tensors)
    _check_dtypes(tensors)
    return tensors, problem.build(*tensors)


def _attend_to_keys(keys: AdditiveAttentionKeys, tensors: Tensors, backend: str) -> Results:
    """`tensors` with the keys' snapshot, which is float32 where something is prepared."""
    given, kind = _kind(tensors, backend, True)
    call = PROBLEMS.call(given, kind)
    if call is not None and _serve(keys, call):
        masks.check_lengths(NAME, tensors[4], call.problem.S)
        run = dispatch.load_backend(NAME, keys.backend).fwd_prepared
        return run(call.problem, tensors, keys._prepared)  # type: ignore[no-any-return]
    problem.check(*tensors)
    masks.check_lengths(NAME, tensors[4], tensors[1].size(1))
    query, snapshot, value, v, *hiding = tensors
    for name, tensor in (("query", query), ("value", value), ("v", v)):
        if wants_gradient(tensor):
            got = f"AdditiveAttentionKeys where a gradient by {name} is wanted"
            remedy = "pass the key itself, or call under torch.no_grad()"
            checks.fail(NAME, "key", got, "a tensor: keys are a snapshot", remedy)
    query, value, v = autocast.cast(query, value, v)
    cast = (query, snapshot, value, v, *hiding)
    same = all(x.dtype == keys.dtype and x.device == keys.device for x in (query, value, v))
    if same and keys._prepared is not None and is_plain([x for x in cast if x is not None]):
        call = Call(problem.find(*cast), backend, given, kind)
        if _serve(keys, call):
            if tracing.is_eager():
                PROBLEMS.put(call, given)
            run = dispatch.load_backend(NAME, keys.backend).fwd_prepared
            return run(call.problem, cast, keys._prepared)  # type: ignore[no-any-return]
    (key,) = autocast.cast(keys.key())
    cast = (query, key, value, v, *hiding)
    _check_dtypes(cast)
    return OP(backend, *cast, sizes=dict(problem.build(*cast).sizes))  # type: ignore[no-any-return]


def _serve(keys: AdditiveAttentionKeys, call: Call[Problem]) -> bool:
    """Whether the call may be given what the keys have prepared."""
    if keys._prepared is None or keys.dtype != call.problem.dtype:
        return False
    if call.differentiable and torch.is_grad_enabled():
        return False
    return call.choose(NAME, False) == keys.backend


def _kind(tensors: Tensors, backend: str, prepared: bool) -> tuple[Tensors, tuple[Any, ...]]:
    """The tensors that there are, and what a call is known by beside them."""
    kind = (backend, prepared, tensors[4] is None, tensors[5] is None)
    if tensors[4] is None and tensors[5] is None:
        return tensors[:4], kind
    return (*tensors[:4], *(t for t in tensors[4:] if t is not None)), kind


def _check_dtypes(tensors: Tensors) -> None:
    checks.same_floating(NAME, zip(("query", "key", "value", "v"), tensors, strict=False))
