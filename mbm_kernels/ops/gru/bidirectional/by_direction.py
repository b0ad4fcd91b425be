"""One call of gru for each direction, by any backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels.ops.gru import gru
from mbm_kernels.ops.gru.problem import PER_DIRECTION


def by_direction(tensors: Sequence[Any], backend: str) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [2, B, H], weights, lengths -> y [T, B, 2H] and h_n [2, B, H]."""
    x, h0, *weights, lengths = tensors
    first, second = (None, None) if h0 is None else (h0[0], h0[1])
    forwards, reverse = weights[:PER_DIRECTION], weights[PER_DIRECTION:]
    y, h_n = gru(x, first, *forwards, lengths=lengths, backend=backend)
    others = gru(x, second, *reverse, lengths=lengths, reverse=True, backend=backend)
    return torch.cat([y, others[0]], -1), torch.stack([h_n, others[1]])
