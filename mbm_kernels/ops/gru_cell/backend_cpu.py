"""csrc/gru_cell: one step from the weights as they are, none of them packed.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.gru_cell import precision


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def fwd(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, features = x.shape
    hidden, dtype = h.size(1), x.dtype
    x, h = precision.rows(x), native.dense(h)
    w_ih, w_hh = precision.plain(w_ih), precision.plain(w_hh)
    b_ih, b_hh = native.dense(b_ih), native.dense(b_hh)
    h_new = torch.empty_like(h, memory_format=torch.contiguous_format)
    reserve = x.new_empty((batch, 4 * hidden)) if save else None
    native.cpu().gru_cell_forward(
        batch,
        features,
        hidden,
        x.data_ptr(),
        x.stride(0),
        h.data_ptr(),
        w_ih.data_ptr(),
        w_hh.data_ptr(),
        native.address(b_ih),
        native.address(b_hh),
        h_new.data_ptr(),
        native.address(reserve),
        torch.get_num_threads(),
    )
    return precision.rounded(h_new, dtype), precision.optional_rounded(reserve, dtype)


def bwd(
    grad_h_new: Tensor | None,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reserve: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    batch, features = x.shape
    hidden, dtype = h.size(1), x.dtype
    if grad_h_new is None:
        grad_h_new = h.new_zeros(h.shape)
    given = (x, h, w_ih, w_hh, b_ih, b_hh)
    wanted = [n and t is not None for n, t in zip(needs, given, strict=True)]
    x, h = precision.rows(x), native.dense(h)
    w_ih, w_hh = precision.plain(w_ih), precision.plain(w_hh)
    reserve, grad_h_new = native.dense(reserve), native.dense(grad_h_new)
    gates = 3 * hidden
    shapes = (x.shape, h.shape, (gates, features), (gates, hidden), (gates,), (gates,))
    grads = [x.new_empty(s) if w else None for s, w in zip(shapes, wanted, strict=True)]
    native.cpu().gru_cell_backward(
        batch,
        features,
        hidden,
        x.data_ptr(),
        x.stride(0),
        h.data_ptr(),
        w_ih.data_ptr(),
        w_hh.data_ptr(),
        reserve.data_ptr(),
        grad_h_new.data_ptr(),
        *map(native.address, grads),
        torch.get_num_threads(),
    )
    return tuple(None if g is None else precision.rounded(g, dtype) for g in grads)
