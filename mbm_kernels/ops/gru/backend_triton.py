"""The Triton kernels of triton_kernels.py between the products that cuBLAS makes.

Forward: one product for the inputs of all steps, then one kernel for the recurrence. Backward: one
kernel, then one product for each gradient. No value is read back from the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div, power_of_two
from mbm_kernels.ops.gru import weight_gradients
from mbm_kernels.ops.gru.problem import Problem

# Up to this many units one program holds W_hh [3H, H] in registers and needs no barrier.
ONE_PROGRAM = {torch.float32: 32, torch.bfloat16: 128, torch.float16: 128}
MOST_PARTS = 8  # of the depth of a product, each of 16 at least
BLOCK_U = 16  # units of a program, in each entry of launch.json
COUNTER = 32  # int32 from one group's counter to the next: 128 bytes, a cache line each


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _tf32(p: Problem) -> bool:
    """Whether stock, cuDNN's GRU, would round float32 factors to tf32."""
    return p.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _rows(name: str, p: Problem, *args: Any) -> None:
    batch, hidden = p.state_shape
    triton_launch.kernel("gru", name)(
        lambda c: (ceil_div(batch, c["BLOCK_B"]),),
        *args,
        dtype=p.dtype,
        sizes={"B": batch, "H": hidden},
        REVERSE=p.reverse,
        TF32=_tf32(p),
        UNITS=max(power_of_two(hidden), 16),
    )


def _grid(name: str, p: Problem, *args: Any) -> None:
    """`args` as the kernel's; `counters` are made here and stand before the sizes T, B, H."""
    # A barrier ends only if all programs run at once: one for each multiprocessor at most.
    machine = triton_launch.machine(p.device)
    most = machine.multiprocessors
    batch, hidden = p.state_shape
    programs = min(ceil_div(hidden, BLOCK_U), most)
    groups = most // programs
    tf32 = _tf32(p)
    triton_launch.kernel("gru", name)(
        lambda c: (programs, min(ceil_div(batch, c["BLOCK_B"]), groups)),
        *args,
        dtype=p.dtype,
        # `rows`: that a group has at least.
        sizes={"H": hidden, "rows": ceil_div(batch, groups), "tf32": tf32, **vars(machine)},
        cooperative=True,
        REVERSE=p.reverse,
        TF32=tf32,
        UNITS=max(power_of_two(hidden), 16 * MOST_PARTS),
    )


def _counters(like: Tensor) -> Tensor:
    """A counter for each group that there can be, at 0."""
    most = triton_launch.machine(like.device).multiprocessors
    return like.new_zeros((most, COUNTER), dtype=torch.int32)


def _empty(x: Tensor, lengths: Tensor | None, *shape: int) -> Tensor:
    """Zeros where there are lengths: kernels stop at the longest row of a block."""
    return x.new_empty(shape) if lengths is None else x.new_zeros(shape)


def fwd(p: Problem, x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh, lengths, save = rest
    (T, B, _), H = p.x_shape, p.hidden
    lengths = None if lengths is None else lengths.to(x.device).contiguous()
    y, h_n = _empty(x, lengths, T, B, H), x.new_empty(B, H)
    reserve = _empty(x, lengths, T, B, 4 * H) if save else x.new_empty(0)
    if T * B * H == 0:
        return y, h_n.zero_() if h0 is None else h_n.copy_(h0), reserve
    inputs = F.linear(x, w_ih, b_ih).contiguous()
    b_hh = None if b_hh is None else b_hh.contiguous()
    kept = reserve if save else None
    start = (0, 0) if h0 is None else h0.stride()
    if ONE_PROGRAM[p.dtype] >= H:
        alone = (inputs, w_hh, b_hh, h0, lengths, y, h_n, kept)
        _rows("rows_forward", p, *alone, T, B, H, *w_hh.stride(), *start)
    else:
        states, exact = x.new_empty(2, B, H), None
        _start(states[0], h0)
        if p.dtype != torch.float32:
            exact = _start(x.new_empty((B, H), dtype=torch.float32), h0)
        group = (inputs, w_hh, b_hh, lengths, y, h_n, kept, states, exact, _counters(x))
        _grid("grid_forward", p, *group, T, B, H, *w_hh.stride())
    return y, h_n, reserve


def _start(state: Tensor, given: Tensor | None) -> Tensor:
    return state.zero_() if given is None else state.copy_(given)


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, h0, *weights, lengths = tensors
    w_hh = weights[1]
    (grad_y, grad_h_n), (y, reserve) = grads, saved
    (T, B, _), H = p.x_shape, p.hidden
    lengths = None if lengths is None else lengths.to(x.device).contiguous()
    gates = _empty(x, lengths, T, B, 4 * H)
    carried = _start(x.new_empty((B, H), dtype=torch.float32), grad_h_n)
    if T * B * H > 0:
        start = (0, 0) if h0 is None else h0.stride()
        arriving = (0, 0, 0) if grad_y is None else grad_y.stride()
        given = (grad_y, y.contiguous(), h0, reserve.contiguous(), w_hh, lengths, carried, gates)
        strides = (*w_hh.stride(), *start, *arriving)
        if ONE_PROGRAM[p.dtype] >= H:
            _rows("rows_backward", p, *given, T, B, H, *strides)
        else:
            counters = _counters(x)
            _grid("grid_backward", p, *given, counters, T, B, H, *strides)
    grad_x, *grad_weights = weight_gradients.by_gates(
        gates, x, y, h0, weights, lengths, p.reverse, (needs[0], *needs[2:])
    )
    return grad_x, carried.to(x.dtype) if needs[1] and h0 is not None else None, *grad_weights
