"""Drawn inputs of cross_attention."""

import torch

from mbm_kernels.testing.draws import COLUMNS, POSITIONS, ROWS, Draws, Inputs, draws


@draws
def cross_attention(given: Draws) -> Inputs:
    batch, heads = given.between(1, 2), given.between(1, 3)
    steps, positions = given.size(ROWS), given.size(POSITIONS)
    features, values = given.size(COLUMNS), given.size(COLUMNS)
    mask = given.mask(
        (batch, heads, steps, positions),
        (batch, 1, 1, positions),
        (heads, 1, positions),
        (steps, positions),
    )
    if mask is not None and given.flag():  # an addend in its place, that hides some positions
        shown, mask = mask, given.randn(*mask.shape)
        # As libraries write padding, whole rows of it too; -1e30 leaves no score even in float64.
        large = given.of(None, None, -1e9, -1e30)
        if large is not None:
            mask[~shown] = large
            mask[..., : 1 + mask.size(-2) // 3, :] = large
            shown = torch.rand(mask.shape, generator=given.generator) < 0.8
        mask[~shown] = -torch.inf
    return {
        "query": given.randn(batch, heads, steps, features) * given.scale,
        "key": given.randn(batch, heads, positions, features),
        "value": given.randn(batch, heads, positions, values),
        "key_lengths": given.lengths(batch, positions),
        "mask": mask,
        "scale": given.of(None, 0.3, -0.2),
        "need_weights": given.of(None, "mean", "heads"),
    }
