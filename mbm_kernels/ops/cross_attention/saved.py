"""What the forward keeps for the backward, on which schema, fake and backends agree."""

import torch
from torch import Tensor


def empty_saved(
    query: Tensor, key: Tensor, value: Tensor, need_weights: str | None, save: bool
) -> Tensor:
    """For the weights of each head, float32 [B, N, T, S], or [0] where they are not kept.

    They are kept while they take at most half the space of key and value; beyond, the backward
    computes them again. With need_weights="heads" they are an output anyway.
    """
    batch, heads, steps, features = query.shape
    if save and need_weights != "heads" and 2 * steps <= features + value.size(3):
        return query.new_empty(batch, heads, steps, key.size(2), dtype=torch.float32)
    return query.new_empty(0, dtype=torch.float32)
