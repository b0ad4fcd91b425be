"""csrc/cross_attention: scores, softmax and context block by block, weights at hardly any cost.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.cross_attention.saved import empty_saved

_NONE = (0, 0, 0, 0)


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _rows(x: Tensor) -> Tensor:
    """float32 with contiguous rows; the other strides may be anything."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _heads(x: Tensor | None) -> tuple[int, int, int, int]:
    if x is None:
        return _NONE
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def _mask(
    mask: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, tuple[int, int, int, int, int, bool]]:
    if mask is None:
        return None, (0, 0, 0, 0, 0, False)
    added = mask.dtype is not torch.bool
    mask = (mask.to(torch.float32) if added else mask).expand(shape)
    strides = mask.stride()
    return mask, (mask.data_ptr(), strides[0], strides[1], strides[2], strides[3], added)


class _Inputs:
    """What forward and backward both pass first; keeps the converted tensors alive."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ):
        batch, heads, steps, features = query.shape
        positions = key.size(2)
        self.weights_shape = (batch, heads, steps, positions)
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.key_lengths = None if key_lengths is None else key_lengths.cpu().contiguous()
        self.mask, mask_args = _mask(mask, self.weights_shape)
        self.args = (
            (*self.weights_shape, features, value.size(3)),
            scale,
            _heads(self.query),
            _heads(self.key),
            _heads(self.value),
            native.address(self.key_lengths),
            mask_args,
        )


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(query, key, value, key_lengths, mask, scale)
    batch, count, steps, positions = inputs.weights_shape
    dtype = query.dtype
    context = inputs.query.new_empty((batch, count, steps, value.size(3)))
    saved = empty_saved(query, key, value, need_weights, save)
    weights, heads = saved, saved  # not returned and not kept: addresses 0, as of any empty tensor
    if need_weights == "mean":
        weights = inputs.query.new_empty((batch, steps, positions))
    elif need_weights == "heads":
        weights = heads = inputs.query.new_empty(inputs.weights_shape)
    native.cpu().cross_attention_fwd(
        *inputs.args,
        _heads(context),
        weights.data_ptr() if need_weights == "mean" else 0,
        heads.data_ptr(),
        torch.get_num_threads(),
    )
    if need_weights is None:
        weights = query.new_empty(0)
    if dtype is not torch.float32:
        context, weights = context.to(dtype), weights.to(dtype)
    return context, weights, saved


def bwd(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    weights: Tensor,
    saved: Tensor,
    scale: float,
    need_weights: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    inputs = _Inputs(query, key, value, key_lengths, mask, scale)
    heads = native.dense(weights if need_weights == "heads" else saved)
    if grad_context is not None:
        grad_context = _rows(grad_context)
    share = 1.0
    if grad_weights is not None:
        if need_weights == "mean":
            share, grad_weights = 1 / query.size(1), grad_weights.unsqueeze(1)
        grad_weights = _rows(grad_weights).expand(inputs.weights_shape)
    # In the order of the inputs' own dimensions, so that splitting heads needs no copy backward.
    grads = [
        torch.empty_like(x, dtype=torch.float32) if need else None
        for x, need in zip((query, key, value), needs, strict=False)
    ]
    grads = [g if g is None or g.stride(3) == 1 else native.empty(g.shape) for g in grads]
    grad_mask = native.empty(inputs.weights_shape) if needs[3] and mask is not None else None
    native.cpu().cross_attention_bwd(
        *inputs.args,
        heads.data_ptr(),
        _heads(grad_context),
        _heads(grad_weights),
        share,
        *map(_heads, grads),
        native.address(grad_mask),
        torch.get_num_threads(),
    )
    if grad_mask is not None and mask is not None:
        grads.append(grad_mask.sum_to_size(mask.shape))
    else:
        grads.append(None)
    return tuple(None if grad is None else grad.to(query.dtype) for grad in grads)
