"""The definition of one GRU step, without tricks."""

import torch
from torch import Tensor


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """x [B, C], h [B, H], w_ih [3H, C], w_hh [3H, H], biases [3H] -> h' [B, H]."""
    from_input = x @ w_ih.t()
    from_state = h @ w_hh.t()
    if b_ih is not None:
        from_input = from_input + b_ih
    if b_hh is not None:
        from_state = from_state + b_hh
    input_r, input_z, input_n = from_input.chunk(3, -1)
    state_r, state_z, state_n = from_state.chunk(3, -1)
    r = torch.sigmoid(input_r + state_r)
    z = torch.sigmoid(input_z + state_z)
    n = torch.tanh(input_n + r * state_n)
    return (1 - z) * n + z * h
