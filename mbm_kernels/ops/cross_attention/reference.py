"""The definition of cross attention with its weights, without tricks."""

import torch
from torch import Tensor


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """query [B, N, T, D], key [B, N, S, D], value [B, N, S, E] -> [B, N, T, E] and weights."""
    batch, heads, steps, features = query.shape
    positions = key.size(2)
    if scale is None:
        scale = max(features, 1) ** -0.5
    scores = scale * (query[:, :, :, None, :] * key[:, :, None, :, :]).sum(-1)
    attend = torch.ones(batch, heads, steps, positions, dtype=torch.bool, device=query.device)
    if mask is not None and mask.dtype == torch.bool:
        attend = attend & mask
    elif mask is not None:
        scores = scores + mask
        attend = attend & (mask != -torch.inf)
    if key_lengths is not None:
        inside = (
            torch.arange(positions, device=query.device) < key_lengths.to(query.device)[:, None]
        )
        attend = attend & inside[:, None, None, :]
    # A row with nothing to attend to has weights 0: the sum over an empty set.
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax(scores.masked_fill(~attend, lowest), -1).masked_fill(~attend, 0)
    context = weights @ value
    if need_weights is None:
        return context
    return context, weights.mean(1) if need_weights == "mean" else weights
