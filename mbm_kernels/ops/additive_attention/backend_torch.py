"""The fastest PyTorch baseline: a broadcast add, tanh, a matrix-vector product, softmax, a bmm."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import masks
from mbm_kernels.ops.additive_attention.problem import Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    p: Problem, query: Tensor, key: Tensor, value: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    key_lengths, mask, save = rest
    attend = masks.attend_mask(mask, key_lengths, key.size(1), key.device)
    if attend is None:
        weights = torch.softmax(_scores(query, key, v, None), -1)
        return torch.bmm(weights, value), weights
    attend = attend.reshape(*(1,) * (3 - attend.dim()), *attend.shape)
    looks = masks.readable((query, key, value, attend))
    hidden = None
    if not looks or not masks.all_finite(query, key, value):
        clean = masks.unread(query, key, value, attend)
        if looks and attend.size(1) > 1 and not masks.all_finite(*clean[1:]):
            # A NaN that is hidden from some queries and not from others.
            hidden = ~attend.unsqueeze(-1)
        else:
            query, key, value = clean
    weights = masks.softmax(_scores(query, key, v, hidden), attend)
    if hidden is not None:
        values = value.unsqueeze(1).masked_fill(hidden, 0)  # [B, T, S, E]
        return torch.matmul(weights.unsqueeze(2), values).squeeze(2), weights
    context = torch.bmm(weights, value)
    if save:
        context = masks.constant_where_empty(context, attend, looks)
    return context, weights


def _scores(query: Tensor, key: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    sums = query.unsqueeze(2) + key.unsqueeze(1)
    return torch.tanh(sums if hidden is None else sums.masked_fill(hidden, 0)) @ v
