"""Captions for a whole set, and how good they are."""

from __future__ import annotations

from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, normalise
from mbm_kernels.captioning.metrics import score
from mbm_kernels.models import Captioner

BATCH = 128


def caption_set(
    model: Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    max_length: int = 24,
    beam: int = 1,
) -> tuple[list[str], list[Tensor]]:
    """A generated caption for each image, and the attention of each one's words, [length, S]."""
    texts: list[str] = []
    weights: list[Tensor] = []
    for start in range(0, len(captions.images), BATCH):
        images = normalise(captions.images[start : start + BATCH])
        tokens, maps = model.generate(images, max_length, beam, True)
        texts += [tokenizer.decode(row) for row in tokens]
        weights += maps
    return texts, weights


def evaluate(
    model: Captioner,
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    max_length: int = 24,
    beam: int = 1,
) -> tuple[list[str], dict[str, float], list[Tensor]]:
    """Caption a set and score it against its own captions.

    Returns:
        predictions; their scores by `metrics.score`; attention weights per caption.
    """
    texts, weights = caption_set(model, captions, tokenizer, max_length=max_length, beam=beam)
    return texts, score(texts, captions.references), weights
