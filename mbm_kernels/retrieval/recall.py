"""How often what belongs to a query is among the first k found.

A query is an image or a caption of a set of M images with N captions. To a caption belongs every
image that has the same caption, so that one that several images share counts as found with any of
them; to an image, every caption that belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet

KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")

Recalls = dict[str, dict[str, float]]  # direction -> "R@k" -> 0..1


def recalls(image: Tensor, text: Tensor, belongs: Tensor, ks: Sequence[int] = KS) -> Recalls:
    """R@k in both directions of embeddings [M, D] and [N, D], by their products.

    An item that ties with the best that belongs to the query counts as ranked before it.

    Args:
        belongs: bool [N, M], see `belonging`.
    """
    scores = text @ image.T
    ranks = {"text_to_image": _ranks(scores, belongs), "image_to_text": _ranks(scores.T, belongs.T)}
    return {
        way: {f"R@{k}": float((rank < k).double().mean()) for k in ks}
        for way, rank in ranks.items()
    }


def chance(belongs: Tensor, ks: Sequence[int] = KS) -> Recalls:
    """The expectation of R@k under a random order: 1 - C(N - m, k) / C(N, k) for m that belong."""
    return {
        way: {f"R@{k}": _hit(found, k) for k in ks}
        for way, found in zip(DIRECTIONS, (belongs, belongs.T), strict=True)
    }


def belonging(captions: CaptionSet) -> Tensor:
    """bool [N, M]: whether image m has a caption equal to caption n."""
    number = {caption: k for k, caption in enumerate(dict.fromkeys(captions.captions))}
    ids = torch.tensor([number[caption] for caption in captions.captions])
    images = captions.image_of
    images = torch.arange(len(ids)) if images is None else images
    has = torch.zeros(len(number), len(captions.images), dtype=torch.bool)
    has[ids, images] = True
    return has[ids]


def _hit(belongs: Tensor, k: int) -> float:
    """The mean over the rows' queries."""
    total, counts = belongs.shape[1], belongs.sum(dim=1).double()
    drawn = torch.arange(min(k, total))
    missed = ((total - counts[:, None] - drawn) / (total - drawn)).clamp(min=0).prod(dim=1)
    return float((1 - missed).mean())


def _ranks(scores: Tensor, belongs: Tensor) -> Tensor:
    """How many items that do not belong to a row's query come before the first that does."""
    best = scores.masked_fill(~belongs, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~belongs).sum(dim=1)
