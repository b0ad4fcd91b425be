"""Masks and lengths of attention, for the plain-torch backends."""

import torch
from torch import Tensor


def attend_mask(
    mask: Tensor | None, key_lengths: Tensor | None, positions: int, device: torch.device
) -> Tensor | None:
    """`mask` AND position < key_lengths[b], True = attend; None where both are None.

    Args:
        mask: bool, broadcastable to [B, ..., S].
        key_lengths: int64 [B].
        positions: S.
        device: of the scores; lengths may be elsewhere.

    Returns:
        bool, broadcastable to [B, ..., S]; three-dimensional where `mask` has fewer dimensions.
    """
    if key_lengths is None:
        return mask
    inside = torch.arange(positions, device=device) < key_lengths.to(device)[:, None]
    if mask is None:
        return inside[:, None, :]
    between = max(mask.dim(), 3) - 2
    return mask & inside.view(inside.size(0), *(1,) * between, positions)
