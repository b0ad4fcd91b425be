"""The definition of a layer of both directions: the definition of each."""

import torch
from torch import Tensor

from mbm_kernels.ops.gru.reference import gru


def gru_bidirectional(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor,
    w_hh_reverse: Tensor,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [2, B, H], weights as for gru -> [T, B, 2H], [2, B, H]."""
    reverse = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    first, second = (None, None) if h0 is None else (h0[0], h0[1])
    y, h_n = gru(x, first, w_ih, w_hh, b_ih, b_hh, lengths)
    y_reverse, h_n_reverse = gru(x, second, *reverse, lengths, reverse=True)
    return torch.cat([y, y_reverse], -1), torch.stack([h_n, h_n_reverse])
