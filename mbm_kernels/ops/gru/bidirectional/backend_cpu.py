"""csrc/gru with both directions in one call, at once where the threads are even in number.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.gru import packed
from mbm_kernels.ops.gru_cell import precision


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def fwd(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    steps, batch, features = x.shape
    hidden, dtype = w_hh.size(1), x.dtype
    weights = packed.forward(w_ih, w_hh, b_ih, b_hh)
    reverse = packed.forward(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse)
    x, h0, lengths = precision.rows(x), native.dense(h0), packed.lengths_on_cpu(lengths)
    y = x.new_empty((steps, batch, 2 * hidden))
    h_n = x.new_empty((2, batch, hidden))
    reserve = x.new_empty((2, steps, batch, 4 * hidden)) if save else None
    native.cpu().gru_bidirectional_forward(
        steps,
        batch,
        features,
        hidden,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        native.address(h0),
        weights.data_ptr(),
        reverse.data_ptr(),
        native.address(lengths),
        y.data_ptr(),
        h_n.data_ptr(),
        native.address(reserve),
        torch.get_num_threads(),
    )
    if reserve is not None and lengths is not None:
        # Rows are saved one after another, valid ones only; the same call gives the same tensor.
        valid = int(lengths.clamp(0, steps).sum())
        reserve.view(2, -1, 4 * hidden)[:, valid:].zero_()
    return (
        precision.rounded(y, dtype),
        precision.rounded(h_n, dtype),
        precision.optional_rounded(reserve, dtype),
    )


def bwd(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    steps, batch, features = x.shape
    hidden, dtype = w_hh.size(1), x.dtype
    weights = w_ih, w_hh, b_ih, b_hh
    others = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    given = (x, h0, *weights, *others)
    x, h0, lengths = precision.rows(x), native.dense(h0), packed.lengths_on_cpu(lengths)
    y, reserve = native.dense(y), native.dense(reserve)
    grad_y = None if grad_y is None else precision.rows(grad_y)
    grad_h_n = native.dense(grad_h_n)
    grads = [
        x.new_empty(tensor.shape) if needed and tensor is not None else None
        for needed, tensor in zip(needs, given, strict=True)
    ]
    recurrent, recurrent_reverse = packed.recurrent(w_hh), packed.recurrent(w_hh_reverse)
    inputs = [packed.inputs(w) if needs[0] else None for w in (w_ih, w_ih_reverse)]
    native.cpu().gru_bidirectional_backward(
        steps,
        batch,
        features,
        hidden,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        native.address(h0),
        recurrent.data_ptr(),
        recurrent_reverse.data_ptr(),
        *map(native.address, inputs),
        native.address(lengths),
        y.data_ptr(),
        reserve.data_ptr(),
        native.address(grad_y),
        *((0, 0) if grad_y is None else (grad_y.stride(0), grad_y.stride(1))),
        native.address(grad_h_n),
        *map(native.address, grads[:2]),
        tuple(map(native.address, grads[2:6])),
        tuple(map(native.address, grads[6:])),
        torch.get_num_threads(),
    )
    return tuple(None if g is None else precision.rounded(g, dtype) for g in grads)
