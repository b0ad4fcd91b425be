"""The definition of the cross-entropy of projected hidden states, without tricks."""

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """hidden [..., H], weight [V, H], target [...], bias [V] -> [...] or a scalar."""
    ignored = target == ignore_index
    # What an ignored row holds is not read: even a NaN reaches neither a result nor a gradient.
    hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0)
    logits = hidden @ weight.t()  # [..., V]
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits, -1)
    picked = log_probs.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    rows = -(1 - label_smoothing) * picked
    if label_smoothing != 0:
        rows = rows - label_smoothing * log_probs.mean(-1)
    if z_loss != 0:
        rows = rows + z_loss * torch.logsumexp(logits, -1) ** 2
    rows = rows.masked_fill(ignored, 0)
    if reduction == "none":
        return rows
    return rows.sum() / (~ignored).sum() if reduction == "mean" else rows.sum()
