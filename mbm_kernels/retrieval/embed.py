"""Embeddings of captioned sets and of texts, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, normalise, padded
from mbm_kernels.models import TwoTower

BATCH = 128


@torch.no_grad()
def embed_set(
    model: TwoTower, captions: CaptionSet, tokenizer: WordTokenizer
) -> tuple[Tensor, Tensor]:
    """The M images and the N captions of a set: [M, D] and [N, D], rows of length 1."""
    images = [
        embed_pictures(model, captions.images[start : start + BATCH])
        for start in range(0, len(captions.images), BATCH)
    ]
    texts = []
    for start in range(0, len(captions), BATCH):
        rows = [tokenizer.encode(text) for text in captions.captions[start : start + BATCH]]
        texts.append(_embed_words(model, rows, tokenizer))
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def embed_texts(model: TwoTower, texts: Sequence[str], tokenizer: WordTokenizer) -> Tensor:
    """[N, D] of N texts.

    Raises:
        ValueError: a text without words, or of words that the model has never seen.
    """
    encoded = [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if all(i <= tokenizer.unk_id for i in ids):
            raise ValueError(
                f"text: got {text!r}, which has no word that the model knows, expected some; use "
                "words of the captions that it was trained on"
            )
    return _embed_words(model, encoded, tokenizer)


def _embed_words(model: TwoTower, encoded: list[list[int]], tokenizer: WordTokenizer) -> Tensor:
    return model.embed_texts(*padded(encoded, tokenizer.pad_id))


@torch.no_grad()
def embed_pictures(model: TwoTower, pictures: Tensor) -> Tensor:
    """[N, D] of uint8 images [N, 3, Y, X]."""
    return model.embed_images(normalise(pictures))
