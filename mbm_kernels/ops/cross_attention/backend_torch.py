"""The best stock form: SDPA without weights, two matrix products and a softmax with them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.masks import attend_mask


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: str | None,
    save: bool,
) -> tuple[Tensor | None, ...]:
    attend, added = _masks(key_lengths, mask, key)
    if need_weights is None:
        # SDPA gives 0, and gradients of 0, for a row that is masked throughout.
        masks = attend if added is None else added
        context = F.scaled_dot_product_attention(query, key, value, masks, scale=scale)
        return context, None, None  # making empty tensors takes 2 us
    scores = _scores(query, key, scale)
    if added is not None:
        attend = added != -torch.inf
        scores = scores + added
    if attend is None:
        weights = torch.softmax(scores, -1)
    else:
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores.masked_fill(~attend, lowest), -1).masked_fill(~attend, 0)
    return weights @ value, weights.mean(1) if need_weights == "mean" else weights, None


def _masks(
    key_lengths: Tensor | None, mask: Tensor | None, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """One mask out of two, four-dimensional: bool (True = attend) or floating (added)."""
    where = (key.size(2), key.device)
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
        if mask.dtype == torch.bool:
            return attend_mask(mask, key_lengths, *where), None
        inside = attend_mask(None, key_lengths, *where)
        if inside is None:
            return None, mask
        return None, torch.where(inside[:, None], mask, -torch.inf)
    inside = attend_mask(None, key_lengths, *where)
    return (None if inside is None else inside[:, None]), None


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * query @ key^T, [B, N, T, S]; scaled in the accumulator, without a pass of its own."""
    batch, heads, steps, features = query.shape
    rows = query.reshape(batch * heads, steps, features)
    columns = key.reshape(batch * heads, key.size(2), features).transpose(1, 2)
    unused = query.new_zeros(1, 1, 1)
    products = torch.baddbmm(unused, rows, columns, beta=0, alpha=scale)
    return products.view(batch, heads, steps, key.size(2))
