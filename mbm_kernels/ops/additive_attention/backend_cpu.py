"""The C++ kernels of csrc/additive_attention: float32 inside, 16-bit floats cast around them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import native


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _rows(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """float32 [B, R, C] whose C is contiguous, and (address, stride of B, stride of R)."""
    if x is None:
        return None, (0, 0, 0)
    x = x.float()
    if x.stride(2) != 1:
        x = x.contiguous()
    return x, (x.data_ptr(), x.stride(0), x.stride(1))


class PreparedKey(NamedTuple):
    """A key's exponentials and magnitudes, float32, in the layout of one ISA."""

    packed: Tensor
    isa: str | None


def prepare_key(key: Tensor) -> PreparedKey:
    """key [B, S, D], which `fwd` is given beside it: it reads both."""
    _converted, rows = _rows(key)  # alive until the call is over
    packed = native.empty((native.cpu().additive_attention_packed_key_size(*key.shape),))
    native.cpu().additive_attention_pack_key(
        *key.shape, rows, packed.data_ptr(), torch.get_num_threads()
    )
    return PreparedKey(packed, native.isa())


class _Inputs:
    """What forward and backward both pass first; keeps the converted tensors alive."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        mask: Tensor | None,
    ):
        batch, steps, features = query.shape
        positions = key.size(1)
        self.sizes = (batch, steps, positions, features, value.size(2))
        self.query, query_rows = _rows(query)
        self.key, key_rows = _rows(key)
        self.value, value_rows = _rows(value)
        self.v = native.dense(v)
        self.key_lengths = None if key_lengths is None else key_lengths.cpu().contiguous()
        self.mask = None if mask is None else mask.expand(batch, steps, positions)
        self.args = (
            self.sizes,
            query_rows,
            key_rows,
            value_rows,
            self.v.data_ptr(),
            native.address(self.key_lengths),
            (0, 0, 0, 0) if self.mask is None else (self.mask.data_ptr(), *self.mask.stride()),
        )


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    prepared: PreparedKey | None = None,
) -> tuple[Tensor, Tensor]:
    """`prepared` is what `prepare_key` made of `key`; of another ISA it is left alone."""
    inputs = _Inputs(query, key, value, v, key_lengths, mask)
    batch, steps, positions, _, value_features = inputs.sizes
    packed = prepared.packed if prepared is not None and prepared.isa == native.isa() else None
    context = native.empty((batch, steps, value_features))
    weights = native.empty((batch, steps, positions))
    native.cpu().additive_attention_fwd(
        *inputs.args,
        native.address(packed),
        context.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return context.to(query.dtype), weights.to(query.dtype)


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
    inputs = _Inputs(query, key, value, v, key_lengths, mask)
    grad_context, grad_context_rows = _rows(grad_context)
    grad_weights, grad_weights_rows = _rows(grad_weights)
    saved = native.dense(weights)
    grads = [
        native.empty(x.shape) if need else None
        for x, need in zip((query, key, value, v), needs, strict=True)
    ]
    native.cpu().additive_attention_bwd(
        *inputs.args,
        saved.data_ptr(),
        grad_context_rows,
        grad_weights_rows,
        *map(native.address, grads),
        torch.get_num_threads(),
    )
    return tuple(None if grad is None else grad.to(query.dtype) for grad in grads)
