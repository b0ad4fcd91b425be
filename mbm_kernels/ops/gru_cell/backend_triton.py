"""The Triton kernels of triton_kernels.py: one for few rows; two products and one for many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div
from mbm_kernels.ops.gru_cell import gate_gradients

# Up to here the weights, read once by each block of rows, are most of the bytes.
MOST_FUSED_ROWS = 64


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _launch(name: str, x: Tensor, hidden: int, *args: Any) -> None:
    rows = x.size(0)
    triton_launch.kernel("gru_cell", name)(
        lambda c: (ceil_div(rows, c["BLOCK_B"]), ceil_div(hidden, c["BLOCK_U"])),
        *args,
        dtype=x.dtype,
        sizes={"B": rows, "H": hidden},
    )


def fwd(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    (B, C), H = x.shape, h.size(1)
    h_new = x.new_empty(B, H)
    reserve = x.new_empty((B, 4 * H) if save else (0,))
    if B * H == 0:
        return h_new, reserve
    b_ih, b_hh = (None if b is None else b.contiguous() for b in (b_ih, b_hh))
    kept = reserve if save else None
    if B <= MOST_FUSED_ROWS:
        strides = (*x.stride(), *h.stride(), *w_ih.stride(), *w_hh.stride())
        given = (x, h, w_ih, w_hh, b_ih, b_hh, h_new, kept)
        _launch("cell", x, H, *given, B, C, H, *strides)
    else:
        inputs, states = torch.mm(x, w_ih.t()), torch.mm(h, w_hh.t())
        _launch("gates", x, H, inputs, states, h, b_ih, b_hh, h_new, kept, B, H, *h.stride())
    return h_new, reserve


def bwd(
    grad_h_new: Tensor | None,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reserve: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    B, H = h.shape
    gates = x.new_empty(B, 4 * H)
    direct = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[1] else None
    if grad_h_new is not None and B * H > 0:
        strides = (*grad_h_new.stride(), *h.stride())
        given = (grad_h_new, h, reserve.contiguous(), gates, direct)
        _launch("gate_gradients", x, H, *given, B, H, *strides)
    else:
        gates.zero_()
        if direct is not None:
            direct.zero_()
    grad_x, grad_w_ih = gate_gradients.by_input(gates, x, w_ih, (needs[0], needs[2]))
    from_state = gates[:, H:]
    grad_h = None if direct is None else torch.addmm(direct, from_state, w_hh)
    grad_w_hh = torch.mm(from_state.t(), h) if needs[3] else None
    wanted = (needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    return grad_x, grad_h, grad_w_ih, grad_w_hh, *gate_gradients.by_biases(gates, wanted)
