"""How often what belongs to a query is among the first k found.

A query is an image or a caption of a set of N. To it belong all items whose caption is the same,
so that a caption that several images share counts as found with any of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")

Recalls = dict[str, dict[str, float]]  # direction -> "R@k" -> 0..1


def recalls(
    image: Tensor, text: Tensor, captions: Sequence[str], ks: Sequence[int] = KS
) -> Recalls:
    """R@k in both directions of embeddings [N, D], by their products.

    An item that ties with the best that belongs to the query counts as ranked before it.
    """
    same = same_caption(captions)
    scores = text @ image.T  # [N texts, N images]
    ranks = {"text_to_image": _ranks(scores, same), "image_to_text": _ranks(scores.T, same)}
    return {
        way: {f"R@{k}": float((rank < k).double().mean()) for k in ks}
        for way, rank in ranks.items()
    }


def chance(captions: Sequence[str], ks: Sequence[int] = KS) -> Recalls:
    """The expectation of R@k under a random order: 1 - C(N - m, k) / C(N, k) for m that belong."""
    total = len(captions)
    counts = np.array([Counter(captions)[caption] for caption in captions])
    found = {}
    for k in ks:
        drawn = np.arange(min(k, total))
        missed = np.clip((total - counts[:, None] - drawn) / (total - drawn), 0, None).prod(axis=1)
        found[f"R@{k}"] = float((1 - missed).mean())
    return {way: dict(found) for way in DIRECTIONS}


def same_caption(captions: Sequence[str]) -> Tensor:
    """bool [N, N]."""
    number = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([number[caption] for caption in captions])
    return ids[:, None] == ids


def _ranks(scores: Tensor, same: Tensor) -> Tensor:
    """[N], how many items that do not belong to a row's query come before the first that does."""
    best = scores.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~same).sum(dim=1)
