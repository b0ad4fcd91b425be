"""What the four-stream model is given: some of its streams, colours and texts as it takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.seeding import seeded
from mbm_kernels.models import MultimodalBigModel, MultimodalConfig

BINS = 8  # of each of red, green and blue

Subset = tuple[str, ...]  # names of streams


def fresh_model(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    config: MultimodalConfig,
    layers: str,
    seed: int,
) -> MultimodalBigModel:
    """The model before its first step; vocabulary, padding and the image's side are the data's."""
    config = replace(
        config,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        image_size=train_set.images.shape[-1],
    )
    with seeded(seed, -1):
        return MultimodalBigModel(config, layers=layers)


def subsets_of(model: MultimodalBigModel, wanted: Mapping[Subset, float]) -> dict[Subset, float]:
    """Sets of streams and their weights, of each the streams that the model has; equals joined."""
    found: dict[Subset, float] = {}
    for subset, weight in wanted.items():
        kept = tuple(stream for stream in subset if stream in model.parts)
        if kept:
            found[kept] = found.get(kept, 0.0) + weight
    return found


def color_histograms(images: Tensor, bins: int = BINS) -> Tensor:
    """Shares of the pixels of images uint8 [N, 3, Y, X] by colour: float32 [N, bins, bins, bins].

    Raises:
        ValueError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"color_histograms: images: got {images.dtype}, expected torch.uint8; pass the raw "
            "pictures"
        )
    binned = images.flatten(2).long() * bins // 256  # [N, 3, P]
    color = (binned[:, 0] * bins + binned[:, 1]) * bins + binned[:, 2]
    counts = torch.zeros(len(images), bins**3)
    counts.scatter_add_(1, color, torch.ones(()).expand(color.shape))
    return (counts / max(color.shape[1], 1)).view(-1, bins, bins, bins)


def text_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """How many tokens [B, T] are no padding, which no text contains: int64 [B]."""
    return (tokens != pad_id).sum(dim=1)
