"""The definition of a GRU over a sequence, without tricks."""

import torch
from torch import Tensor

from mbm_kernels.ops.gru_cell.reference import gru_cell


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [B, H], w_ih [3H, C], w_hh [3H, H], biases [3H] -> [T, B, H], [B, H]."""
    steps, batch = x.size(0), x.size(1)
    h = x.new_zeros(batch, w_hh.size(1)) if h0 is None else h0
    # A row rests in its state outside of its length, and what x and the state hold there is not
    # read: a NaN in x reaches neither a result nor a gradient, one in h0 of a row of length 0
    # reaches its h_n alone.
    inside = torch.ones(steps, batch, 1, dtype=torch.bool, device=x.device)
    if lengths is not None:
        time = torch.arange(steps, device=x.device)
        inside = (time[:, None] < lengths.to(x.device))[:, :, None]
    x = x.masked_fill(~inside, 0)
    outputs = [h.new_empty(0)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        stepped = gru_cell(x[t], h.masked_fill(~inside[t], 0), w_ih, w_hh, b_ih, b_hh)
        h = torch.where(inside[t], stepped, h)
        outputs[t] = stepped.masked_fill(~inside[t], 0)
    y = torch.stack(outputs) if steps else h.new_zeros(0, batch, h.size(1))
    return y, h.clone()
