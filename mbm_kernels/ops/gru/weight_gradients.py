"""Gradients of one direction's input and parameters out of its gates' gradients.

Shared by the GPU backends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels.ops.gru_cell import gate_gradients


def by_gates(
    gates: Tensor,
    x: Tensor,
    y: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of x, w_ih, w_hh, b_ih and b_hh, where needed; `gates` [T, B, 4H] holds n, r, z and r n.

    y [T, B, H]: the direction's own.
    """
    T, B, C = x.shape
    w_ih, _, *biases = weights
    assert w_ih is not None
    flat = gates.reshape(T * B, gates.size(2))
    if lengths is not None and needs[1]:  # whatever x holds past a length, even NaN, is not read
        outside = torch.arange(T, device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(outside.unsqueeze(2), 0)
    grad_x, grad_w_ih = gate_gradients.by_input(flat, x.reshape(T * B, C), w_ih, needs[:2])
    from_state = gates[:, :, gates.size(2) // 4 :]
    grad_w_hh = _by_recurrent(from_state, y, h0, lengths, reverse) if needs[2] else None
    wanted = [n and bias is not None for n, bias in zip(needs[3:], biases, strict=True)]
    return (
        None if grad_x is None else grad_x.view(T, B, C),
        *(grad_w_ih, grad_w_hh, *gate_gradients.by_biases(flat, wanted)),
    )


def _by_recurrent(
    from_state: Tensor, y: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """Gradient of w_hh [3H, H] of from_state [T, B, 3H]: each step against the state before it.

    That is y one step on, and h0 at a row's first step. y is 0 past a length, and so is from_state.
    """
    steps, batch, gates = from_state.shape
    later, before = (from_state[:-1], y[1:]) if reverse else (from_state[1:], y[:-1])
    grad = torch.mm(later.flatten(0, 1).t(), before.flatten(0, 1))
    if h0 is None or steps == 0:
        return grad
    first = from_state[-1 if reverse else 0]
    if lengths is not None:  # a row of length 0 does not read its h0, even a NaN
        h0 = h0.masked_fill(lengths.unsqueeze(1) <= 0, 0)
        if reverse:
            last = lengths.clamp(1, steps).sub(1).view(1, batch, 1).expand(1, batch, gates)
            first = from_state.gather(0, last)[0]
    return grad.addmm_(first.t(), h0)
