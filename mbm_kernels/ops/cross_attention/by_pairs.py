"""The form that reads no hidden pair, whatever it holds: for plain torch, at any cost."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mbm_kernels._core import masks

PIECE = 2**22  # elements of a piece's keys, 16 MiB in float32


def by_pairs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Tensor,
    added: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Context and weights of each head, where a NaN is hidden from some queries only.

    Every query has keys and values of its own, 0 where they are hidden: T times the memory, for a
    few queries at a time, which the backward computes again.
    """
    batch, heads, steps, features = query.shape
    positions = key.size(2)
    shape = (batch, heads, steps, positions)
    attend = attend.expand(shape)
    added = None if added is None else added.expand(shape)
    each = batch * heads * positions * max(features, value.size(3), 1)
    together = max(1, PIECE // max(each, 1))
    contexts, weights = [], []
    for t in range(0, steps, together):
        rows = slice(t, t + together)
        addend = None if added is None else added[:, :, rows]
        given = (query[:, :, rows], key, value, attend[:, :, rows], addend, scale)
        found = checkpoint(_piece, *given, use_reentrant=False) if save else _piece(*given)
        contexts.append(found[0])
        weights.append(found[1])
    return torch.cat(contexts, 2), torch.cat(weights, 2)


def _piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Tensor,
    added: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    hidden = ~attend[..., None]
    q = query[:, :, :, None].masked_fill(hidden, 0)
    k = key[:, :, None].masked_fill(hidden, 0)
    scores = scale * (q * k).sum(-1)
    if added is not None:
        scores = scores + added
    weights = masks.softmax(scores, attend)
    return (weights[..., None, :] @ value[:, :, None].masked_fill(hidden, 0)).squeeze(-2), weights
