"""The definition of additive attention, without tricks."""

import torch
from torch import Tensor


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query [B, T, D], key [B, S, D], value [B, S, E], v [D] -> [B, T, E], [B, T, S]."""
    batch, steps, positions = query.size(0), query.size(1), key.size(1)
    attend = torch.ones(batch, steps, positions, dtype=torch.bool, device=query.device)
    if mask is not None:
        attend = attend & mask
    if key_lengths is not None:
        inside = (
            torch.arange(positions, device=query.device) < key_lengths.to(query.device)[:, None]
        )
        attend = attend & inside[:, None, :]
    # What is hidden is not read: a pair [T, S] that is hidden has 0 in place of its sum and of its
    # value, so that a NaN there meets no factor in either direction.
    hidden = ~attend[..., None]
    sums = (query[:, :, None, :] + key[:, None, :, :]).masked_fill(hidden, 0)
    scores = (torch.tanh(sums) * v).sum(-1)
    # A row with nothing to attend to has weights 0: the sum over an empty set.
    nothing = ~attend.any(-1, keepdim=True)
    scores = scores.masked_fill(~attend, -torch.inf).masked_fill(nothing, 0)
    weights = torch.softmax(scores, -1).masked_fill(~attend, 0)
    values = value[:, None, :, :].masked_fill(hidden, 0)
    return (weights[..., None, :] @ values).squeeze(-2), weights
