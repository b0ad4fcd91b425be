"""Gradients of inputs and parameters out of the gates' gradients: one product each.

Shared by the GPU backends of gru and gru_cell.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def by_input(gates: Tensor, x: Tensor, w_ih: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Of x [R, C] and w_ih [3H, C], where needed; `gates` [R, 4H] holds n, r, z and r n.

    x is read only for the gradient of w_ih.
    """
    hidden = w_ih.size(0) // 3
    from_input = gates[:, : 3 * hidden]
    grad_x = torch.mm(from_input, w_ih.roll(hidden, 0)) if needs[0] else None
    grad_w = torch.mm(from_input.t(), x).roll(-hidden, 0) if needs[1] else None
    return [grad_x, grad_w]


def by_biases(gates: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Of b_ih and b_hh [3H], where needed; `gates` [R, 4H]."""
    if not any(needs):
        return [None, None]
    hidden = gates.size(1) // 4
    sums = gates.sum(0)
    return [
        sums[: 3 * hidden].roll(-hidden) if needs[0] else None,
        sums[hidden:].clone() if needs[1] else None,
    ]


def of_step(
    gates: Tensor, direct: Tensor | None, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of x, h, w_ih, w_hh, b_ih and b_hh, where needed; `gates` [B, 4H].

    `direct`: the gradient of h but for W_hh's part, None where h's is not needed.
    """
    x, h, w_ih, w_hh, *biases = tensors
    grad_x, grad_w_ih = by_input(gates, x, w_ih, (needs[0], needs[2]))
    from_state = gates[:, h.size(1) :]
    grad_h = None if direct is None else torch.addmm(direct, from_state, w_hh)
    grad_w_hh = torch.mm(from_state.t(), h) if needs[3] else None
    wanted = [n and bias is not None for n, bias in zip(needs[4:], biases, strict=True)]
    return grad_x, grad_h, grad_w_ih, grad_w_hh, *by_biases(gates, wanted)
