"""The C++ kernels of csrc/additive_attention: float32 inside, 16-bit floats cast around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native, packing

# Where a key's exponentials are kept: 1.2 to 2 times faster; below, looking them up (2 us) costs
# what they save, above they would cost memory (64 MiB).
MOST_STEP_QUERIES = 8
LEAST_KEPT, MOST_KEPT = 2**15, 2**24


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


def _packed_key_size(key: Tensor) -> int:
    size: int = native.cpu().additive_attention_packed_key_size(*key.shape)
    return size


def _pack_key(out: Tensor, key: Tensor) -> None:
    _converted, rows = _rows(key)  # alive until the call is over
    native.cpu().additive_attention_pack_key(
        *key.shape, rows, out.data_ptr(), torch.get_num_threads()
    )


def _kept_key(query: Tensor, key: Tensor) -> Tensor | None:
    """The key's exponentials, from the second call with a key on: decoding keeps one for all its
    steps, training has a new one each time."""
    if query.size(1) > MOST_STEP_QUERIES or not LEAST_KEPT <= key.numel() <= MOST_KEPT:
        return None
    return packing.packed_if_used_again(_packed_key_size, _pack_key, key)


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
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(query, key, value, v, key_lengths, mask)
    batch, steps, positions, _, value_features = inputs.sizes
    kept = _kept_key(query, key)
    context = native.empty((batch, steps, value_features))
    weights = native.empty((batch, steps, positions))
    native.cpu().additive_attention_fwd(
        *inputs.args,
        native.address(kept),
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
