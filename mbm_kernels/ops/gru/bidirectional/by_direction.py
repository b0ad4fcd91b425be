"""One call of gru for each direction, by any backend."""

import torch
from torch import Tensor

from mbm_kernels.ops.gru import gru

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def by_direction(
    x: Tensor,
    h0: Tensor | None,
    weights: Weights,
    reverse: Weights,
    lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [2, B, H] -> y [T, B, 2H] and h_n [2, B, H]."""
    first, second = (None, None) if h0 is None else (h0[0], h0[1])
    y, h_n = gru(x, first, *weights, lengths=lengths, backend=backend)
    others = gru(x, second, *reverse, lengths=lengths, reverse=True, backend=backend)
    return torch.cat([y, others[0]], -1), torch.stack([h_n, others[1]])
