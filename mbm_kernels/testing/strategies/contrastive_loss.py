"""Drawn inputs of contrastive_loss."""

import torch

from mbm_kernels.testing.draws import CLASSES, DEPTH, Draws, Inputs, draws


@draws
def contrastive_loss(given: Draws) -> Inputs:
    batch, features = given.size(CLASSES), given.size(DEPTH)
    kind = given.of("infonce", "siglip")
    spread = given.scale * features**-0.25  # logits as large as the scale squared
    return {
        "image": given.randn(batch, features) * spread,
        "text": given.randn(batch, features) * spread,
        "scale": torch.tensor(given.of(1.3, 5.0), dtype=torch.float64),
        "bias": torch.tensor(-1.7, dtype=torch.float64) if kind == "siglip" else None,
        "kind": kind,
    }
