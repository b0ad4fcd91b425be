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
    attend = torch.ones(batch, heads, steps, positions, dtype=torch.bool, device=query.device)
    if mask is not None:
        attend = attend & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    if key_lengths is not None:
        inside = (
            torch.arange(positions, device=query.device) < key_lengths.to(query.device)[:, None]
        )
        attend = attend & inside[:, None, None, :]
    # What is hidden is not read: each pair [T, S] has rows of its own, 0 where it is hidden, so
    # that a NaN there meets no factor in either direction.
    hidden = ~attend[..., None]
    q = query[:, :, :, None, :].masked_fill(hidden, 0)
    k = key[:, :, None, :, :].masked_fill(hidden, 0)
    v = value[:, :, None, :, :].masked_fill(hidden, 0)
    scores = scale * (q * k).sum(-1)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    # A row with nothing to attend to has weights 0: the sum over an empty set.
    nothing = ~attend.any(-1, keepdim=True)
    scores = scores.masked_fill(~attend, -torch.inf).masked_fill(nothing, 0)
    weights = torch.softmax(scores, -1).masked_fill(~attend, 0)
    context = (weights[..., None, :] @ v).squeeze(-2)
    if need_weights is None:
        return context
    return context, weights.mean(1) if need_weights == "mean" else weights
