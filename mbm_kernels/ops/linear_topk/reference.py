"""The definition of the k largest log-probabilities of a linear head."""

import torch
from torch import Tensor


def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor]:
    """hidden [..., H], weight [V, H], bias [V] -> values and ids [..., k]."""
    logits = hidden @ weight.t()  # [..., V]
    if bias is not None:
        logits = logits + bias
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.log_softmax(logits, -1).gather(-1, ids), ids
