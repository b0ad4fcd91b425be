"""csrc/gru with one step. bfloat16 and float16 are computed in float32 and rounded on store."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.gru_cell import packed


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return packed.why_not(device, dtype)


def fwd(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    batch, features = x.shape
    hidden, dtype = h.size(1), x.dtype
    weights = packed.forward(w_ih, w_hh, b_ih, b_hh)
    x, h = packed.rows(x), packed.dense(h)
    h_new = x.new_empty((batch, hidden))
    reserve = x.new_empty((batch, 4 * hidden) if save else (0,))
    native.cpu().gru_forward(
        1,
        batch,
        features,
        hidden,
        x.data_ptr(),
        0,
        x.stride(0),
        h.data_ptr(),
        weights.data_ptr(),
        0,
        False,
        0,
        h_new.data_ptr(),
        reserve.data_ptr(),
        torch.get_num_threads(),
    )
    return packed.rounded(h_new, dtype), packed.rounded(reserve, dtype)


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
    given = (x, h, w_ih, w_hh, b_ih, b_hh)
    grads = packed.backward(
        (1, batch, features, h.size(1)),
        packed.rows(x).unsqueeze(0),
        packed.dense(h),
        w_ih,
        w_hh,
        None,
        None,
        packed.dense(reserve),
        False,
        None,
        packed.optional_dense(grad_h_new),
        tuple(n and t is not None for n, t in zip(needs, given, strict=True)),
    )
    grad_x, *others = (None if g is None else packed.rounded(g, x.dtype) for g in grads)
    return None if grad_x is None else grad_x.squeeze(0), *others
