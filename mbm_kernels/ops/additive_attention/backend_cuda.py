"""The CUDA C++ kernels of csrc/additive_attention: float32 inside, no host synchronisation."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import cuda_launch, native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.additive_attention.problem import Problem

MOST_POSITIONS = 4096  # whose scores fit into a block's shared memory
MOST_DECODED = 8  # queries of a step of decoding, which prepared keys serve


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if sizes.get("S", 0) > MOST_POSITIONS:
        return f"it holds at most {MOST_POSITIONS} positions in shared memory, not {sizes['S']}"
    return cuda_launch.why_not(device, dtype)


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(cuda_launch.module().additive_attention_cuda_problem_fields())


class _Native:
    """What the kernels are told about a problem, and which inputs they read as they are."""

    __slots__ = ("as_is", "block", "rows", "totals")

    def __init__(self, p: Problem):
        module = cuda_launch.module()
        counts, widths = (p.T, p.S, p.S), (p.D, p.D, p.E)
        self.as_is = [
            dtype is p.dtype and strides[-1] == 1
            for dtype, strides in zip(p.dtypes, p.strides, strict=True)
        ]
        values = {letter: getattr(p, letter) for letter in "BTSDE"}
        values["dtype"] = native.DTYPES.index(p.dtype)
        for i, (name, row) in enumerate((("query", "t"), ("key", "s"), ("value", "s"))):
            dense = (counts[i] * widths[i], widths[i], 1)
            strides = p.strides[i] if self.as_is[i] else dense
            values |= {f"{name}_b": strides[0], f"{name}_{row}": strides[1]}
        strides = p.hiding.expanded_strides(3)
        values |= {f"mask_{axis}": stride for axis, stride in zip("bts", strides, strict=True)}
        self.block = native.block(_fields(), values)
        self.rows = module.additive_attention_cuda_rows(p.T)
        self.totals = self.rows > module.additive_attention_cuda_chunk(p.T)

    def read(self, p: Problem, tensors: Sequence[Any]) -> list[Any]:
        """The inputs as the kernels read them, lengths on the device of the others."""
        *floating, key_lengths, mask = tensors
        if key_lengths is not None:
            key_lengths = key_lengths.to(p.device).contiguous()
        pairs = zip(floating, self.as_is, strict=True)
        read = [x if as_is else x.to(p.dtype).contiguous() for x, as_is in pairs]
        return [*read, key_lengths, mask]


def _empty(p: Problem, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or p.dtype, device=p.device)


def fwd(p: Problem, *given: Any) -> tuple[Tensor, Tensor]:
    context, weights = _empty(p, *p.context_shape), _empty(p, *p.weights_shape)
    if 0 in (p.B, p.T):
        return context, weights
    plan = derived(p, "cuda", _Native)
    read = plan.read(p, given[:-1])  # alive until the launch
    cuda_launch.module().additive_attention_cuda_fwd(
        plan.block,
        native.addresses(read),
        (context.data_ptr(), weights.data_ptr()),
        cuda_launch.place(p.device),
    )
    return context, weights


class PreparedKey(NamedTuple):
    """A key's exponentials and magnitudes, float32."""

    powers: Tensor  # [B, S, D rounded up to a multiple of 4]: e^2k
    magnitudes: Tensor  # [B, S]: the largest |k|


def prepare_key(key: Tensor) -> PreparedKey:
    """key [B, S, D], which `fwd_prepared` is given beside it: it reads both."""
    module = cuda_launch.module()
    batch, positions, features = key.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=key.device)

    made = PreparedKey(
        empty(batch, positions, module.additive_attention_cuda_pitch(features)),
        empty(batch, positions),
    )
    module.additive_attention_cuda_keys(
        tuple(key.shape),
        native.DTYPES.index(key.dtype),
        (key.data_ptr(), key.stride(0), key.stride(1)),
        native.addresses(made),
        cuda_launch.place(key.device),
    )
    return made


def fwd_prepared(
    p: Problem, tensors: Sequence[Any], prepared: PreparedKey
) -> tuple[Tensor, Tensor]:
    """`prepared` is what `prepare_key` made of the key; more queries than a step's read the key."""
    if p.T > MOST_DECODED:
        return fwd(p, *tensors, False)
    context, weights = _empty(p, *p.context_shape), _empty(p, *p.weights_shape)
    if 0 in (p.B, p.T):
        return context, weights
    plan = derived(p, "cuda", _Native)
    read = plan.read(p, tensors)  # alive until the launch
    cuda_launch.module().additive_attention_cuda_decode(
        plan.block,
        native.addresses(read),
        native.addresses(prepared),
        (context.data_ptr(), weights.data_ptr()),
        cuda_launch.place(p.device),
    )
    return context, weights


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    grad_context, grad_weights = grads
    weights = saved[0]
    found: list[Tensor | None] = [None] * 4
    if needs[2]:
        found[2] = _grad_value(p, grad_context, weights)
    if needs[0] or needs[1] or needs[3]:
        terms = _grad_terms(p, grad_context, grad_weights, tensors, weights)
        for place, grad in zip((0, 1, 3), terms, strict=True):
            found[place] = grad if needs[place] else None
    return tuple(found)


def _grad_value(p: Problem, grad_context: Tensor | None, weights: Tensor) -> Tensor:
    if grad_context is None:
        return torch.zeros(p.B, p.S, p.E, dtype=p.dtype, device=p.device)
    if p.hiding:  # of a row with nothing to attend to it is not read
        grad_context = grad_context.masked_fill((weights == 0).all(-1, keepdim=True), 0)
    return torch.bmm(weights.transpose(1, 2), grad_context)


def _grad_terms(
    p: Problem,
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    tensors: Sequence[Any],
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and v."""
    by_query, by_key = _empty(p, p.B, p.T, p.D), _empty(p, p.B, p.S, p.D)
    by_v = _empty(p, p.B, p.D, dtype=torch.float32)
    if 0 in (p.B, p.T, p.S, p.D):
        return by_query.zero_(), by_key.zero_(), by_v.zero_().sum(0).to(p.dtype)
    plan = derived(p, "cuda", _Native)
    read = plan.read(p, tensors)
    _context, context_rows = native.rows(
        grad_context, p.dtype
    )  # alive, as the scratch, until the launch
    _weights, weights_rows = native.rows(grad_weights, p.dtype)
    weights = weights.contiguous()
    scratch = (
        _empty(p, p.B, p.S, plan.rows, dtype=torch.float32),
        _empty(p, *((p.B, p.S, p.D) if plan.totals else (0,)), dtype=torch.float32),
    )
    cuda_launch.module().additive_attention_cuda_bwd(
        plan.block,
        native.addresses(read),
        weights.data_ptr(),
        context_rows,
        weights_rows,
        native.addresses(scratch),
        native.addresses((by_query, by_key, by_v)),
        cuda_launch.place(p.device),
    )
    return by_query, by_key, by_v.sum(0).to(p.dtype)
