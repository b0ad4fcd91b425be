"""A step made of differentiable parts, for torch.func: aten's has no batching rule."""

import torch
import torch.nn.functional as F
from torch import Tensor


def composite(from_input: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """from_input = W_ih x + b_ih [B, 3H], h [B, H] -> h' [B, H]."""
    input_r, input_z, input_n = from_input.chunk(3, -1)
    state_r, state_z, state_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    n = torch.tanh(input_n + torch.sigmoid(input_r + state_r) * state_n)
    return n + torch.sigmoid(input_z + state_z) * (h - n)
