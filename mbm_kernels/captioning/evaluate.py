"""Captions for a whole set, and how good they are."""

from __future__ import annotations

from torch import Tensor

from mbm_kernels import models
from mbm_kernels.captioning.captioner import MAX_LENGTH, Captioner
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.metrics import score

BATCH = 128


def caption_set(
    model: models.Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    max_length: int = MAX_LENGTH,
    beam: int = 1,
) -> tuple[list[str], list[Tensor]]:
    """A generated caption for each image, and the attention of each one's words, [length, S]."""
    captioner, found = Captioner(model, tokenizer), []
    for start in range(0, len(captions.images), BATCH):
        part = captions.images[start : start + BATCH]
        found += captioner.describe(part, max_length=max_length, beam=beam)
    return [caption.text for caption in found], [caption.weights for caption in found]


def evaluate(
    model: models.Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    max_length: int = MAX_LENGTH,
    beam: int = 1,
) -> tuple[list[str], dict[str, float], list[Tensor]]:
    """Caption a set and score it against its own captions.

    Returns:
        predictions; their scores by `metrics.score`; attention weights per caption.
    """
    texts, weights = caption_set(model, captions, tokenizer, max_length=max_length, beam=beam)
    return texts, score(texts, captions.references), weights
