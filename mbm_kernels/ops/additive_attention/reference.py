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
    scores = (torch.tanh(query[:, :, None, :] + key[:, None, :, :]) * v).sum(-1)
    attend = torch.ones(batch, steps, positions, dtype=torch.bool, device=query.device)
    if mask is not None:
        attend = attend & mask
    if key_lengths is not None:
        inside = (
            torch.arange(positions, device=query.device) < key_lengths.to(query.device)[:, None]
        )
        attend = attend & inside[:, None, :]
    # A row with nothing to attend to has weights 0: the sum over an empty set.
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax(scores.masked_fill(~attend, lowest), -1).masked_fill(~attend, 0)
    return weights @ value, weights
