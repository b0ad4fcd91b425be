"""csrc/gru: packed weights, one product for the inputs, gates fused into the recurrent product.

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
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    steps, batch, features = x.shape
    hidden, dtype = w_hh.size(1), x.dtype
    weights = packed.forward(w_ih, w_hh, b_ih, b_hh)
    x, h0, lengths = precision.rows(x), native.dense(h0), packed.lengths_on_cpu(lengths)
    y = x.new_empty((steps, batch, hidden))
    h_n = x.new_empty((batch, hidden))
    reserve = x.new_empty((steps, batch, 4 * hidden)) if save else None
    native.cpu().gru_forward(
        steps,
        batch,
        features,
        hidden,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        native.address(h0),
        weights.data_ptr(),
        native.address(lengths),
        reverse,
        y.data_ptr(),
        h_n.data_ptr(),
        native.address(reserve),
        torch.get_num_threads(),
    )
    if reserve is not None and lengths is not None:
        # Rows are saved one after another, valid ones only; the same call gives the same tensor.
        valid = int(lengths.clamp(0, steps).sum())
        reserve.view(-1, 4 * hidden)[valid:].zero_()
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
    lengths: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    steps, batch, features = x.shape
    given = (x, h0, w_ih, w_hh, b_ih, b_hh)
    grads = packed.backward(
        (steps, batch, features, w_hh.size(1)),
        precision.rows(x),
        native.dense(h0),
        w_ih,
        w_hh,
        packed.lengths_on_cpu(lengths),
        native.dense(y),
        native.dense(reserve),
        reverse,
        None if grad_y is None else precision.rows(grad_y),
        native.dense(grad_h_n),
        tuple(n and t is not None for n, t in zip(needs, given, strict=True)),
    )
    return tuple(None if g is None else precision.rounded(g, x.dtype) for g in grads)
