"""The form that reads no hidden pair, whatever it holds: for plain torch, at any cost."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mbm_kernels._core import masks

PIECE = 2**22  # elements of a piece's keys, 16 MiB in float32


class Hiding(NamedTuple):
    """What a query may attend to, four-dimensional."""

    attend: Tensor  # bool, broadcastable to [B, N, T, S]
    added: Tensor | None  # to the scores, -inf where hidden


def by_pairs(
    scale: float, given: tuple[Tensor, Tensor, Tensor], hiding: Hiding, save: bool
) -> tuple[Tensor, Tensor]:
    """Context and weights of each head, where a NaN is hidden from some queries only.

    Every query has keys and values of its own, 0 where they are hidden: T times the memory, for a
    few queries at a time, which the backward computes again.
    """
    query, key, value = given
    batch, heads, steps, features = query.shape
    positions = key.size(2)
    shape = (batch, heads, steps, positions)
    attend = hiding.attend.expand(shape)
    added = None if hiding.added is None else hiding.added.expand(shape)
    each = batch * heads * positions * max(features, value.size(3), 1)
    together = max(1, PIECE // max(each, 1))
    contexts, weights = [], []
    for t in range(0, steps, together):
        rows = slice(t, t + together)
        addend = None if added is None else added[:, :, rows]
        piece = (scale, query[:, :, rows], key, value, attend[:, :, rows], addend)
        found = checkpoint(_piece, *piece, use_reentrant=False) if save else _piece(*piece)
        contexts.append(found[0])
        weights.append(found[1])
    return torch.cat(contexts, 2), torch.cat(weights, 2)


def _piece(
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Tensor,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    hidden = ~attend[..., None]
    q = query[:, :, :, None].masked_fill(hidden, 0)
    k = key[:, :, None].masked_fill(hidden, 0)
    scores = scale * (q * k).sum(-1)
    if added is not None:
        scores = scores + added
    weights = masks.softmax(scores, attend)
    return (weights[..., None, :] @ value[:, :, None].masked_fill(hidden, 0)).squeeze(-2), weights
