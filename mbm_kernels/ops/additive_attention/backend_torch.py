"""The best stock form: one broadcast add, tanh, a matrix-vector product, softmax, one bmm."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core.masks import attend_mask


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
    attend = attend_mask(mask, key_lengths, key.size(1), key.device)
    if attend is None:
        weights = torch.softmax(scores, -1)
    else:
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores.masked_fill(~attend, lowest), -1).masked_fill(~attend, 0)
    return torch.bmm(weights, value), weights
