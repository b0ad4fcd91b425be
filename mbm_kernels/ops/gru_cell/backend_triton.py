"""The Triton kernels of triton_kernels.py: one for few rows; two products and one for many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div
from mbm_kernels.ops.gru_cell import gate_gradients
from mbm_kernels.ops.gru_cell.problem import Problem

# Up to here the weights, read once by each block of rows, are most of the bytes.
MOST_FUSED_ROWS = 64


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _tf32(p: Problem) -> bool:
    """Whether stock, which multiplies by cuBLAS, would round float32 factors to tf32."""
    return p.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _launch(name: str, p: Problem, *args: Any, **constexprs: Any) -> None:
    batch, hidden = p.state_shape
    triton_launch.kernel("gru_cell", name)(
        lambda c: (ceil_div(batch, c["BLOCK_B"]), ceil_div(hidden, c["BLOCK_U"])),
        *args,
        dtype=p.dtype,
        sizes={"B": batch, "H": hidden},
        **constexprs,
    )


def fwd(p: Problem, x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, *biases, save = rest
    (B, C), H = p.x_shape, p.hidden
    h_new = x.new_empty(B, H)
    reserve = x.new_empty(p.saved_shape if save else (0,))
    if B * H == 0:
        return h_new, reserve
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    kept = reserve if save else None
    if B <= MOST_FUSED_ROWS:
        strides = (*x.stride(), *h.stride(), *w_ih.stride(), *w_hh.stride())
        given = (x, h, w_ih, w_hh, *biases, h_new, kept)
        _launch("cell", p, *given, B, C, H, *strides, TF32=_tf32(p))
    else:
        inputs, states = torch.mm(x, w_ih.t()), torch.mm(h, w_hh.t())
        _launch("gates", p, inputs, states, h, *biases, h_new, kept, B, H, *h.stride())
    return h_new, reserve


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, h = tensors[:2]
    grad_h_new, reserve = grads[0], saved[0]
    B, H = p.state_shape
    gates = x.new_empty(B, 4 * H)
    direct = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[1] else None
    if grad_h_new is not None and B * H > 0:
        strides = (*grad_h_new.stride(), *h.stride())
        given = (grad_h_new, h, reserve.contiguous(), gates, direct)
        _launch("gate_gradients", p, *given, B, H, *strides)
    else:
        gates.zero_()
        if direct is not None:
            direct.zero_()
    return gate_gradients.of_step(gates, direct, tensors, needs)
