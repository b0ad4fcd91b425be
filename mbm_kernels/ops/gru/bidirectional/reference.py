"""The definition of a layer of both directions: the definition of each."""

import torch
from torch import Tensor

from mbm_kernels.ops.gru.reference import gru


def gru_bidirectional(
    x: Tensor, h0: Tensor | None, lengths: Tensor | None = None, **weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [T, B, C], h0 [2, B, H] -> [T, B, 2H], [2, B, H]; weights by name as for gru, those of the
    second direction with `_reverse` behind it."""
    second = {n: weights.pop(n) for n in list(weights) if n.endswith("_reverse")}
    reverse = {name.removesuffix("_reverse"): weight for name, weight in second.items()}
    first, last = (None, None) if h0 is None else (h0[0], h0[1])
    y, h_n = gru(x, first, **weights, lengths=lengths)  # type: ignore[arg-type]
    y_reverse, h_n_reverse = gru(x, last, **reverse, lengths=lengths, reverse=True)  # type: ignore[arg-type]
    return torch.cat([y, y_reverse], -1), torch.stack([h_n, h_n_reverse])
