"""One word of each hypothesis: the captioner's step as search calls it.

A `Decoder` maps the last words [B, K] and states [B, K, H] to log-probabilities and ids of the k
likeliest words [B, K, k], the new states and the attention weights [B, K, S]. All that differs from
image to image is in `pictures`, so that a recorded loop can be run again on other images.

K hypotheses of one image are K queries over the same keys, so nothing of the image is copied.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import autocast, packing
from mbm_kernels._core.tracing import is_plain
from mbm_kernels.models.search_state import Decoder, EncodedImages, StepModel, Words
from mbm_kernels.ops.additive_attention import AdditiveAttentionKeys, additive_attention_keys
from mbm_kernels.ops.linear_topk import linear_topk


class StockDecoder:
    """The model's step, then what a user of PyTorch writes: argmax, or log_softmax and topk.

    topk leaves open which of equal words it takes; argmax takes the lowest id.
    """

    def __init__(self, model: StepModel, encoded: EncodedImages) -> None:
        self.model, self.pictures = model, encoded

    def for_pictures(self, pictures: EncodedImages) -> StockDecoder:
        return StockDecoder(self.model, pictures)

    def for_steps(self) -> StockDecoder:
        return self

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words:
        logits, state, weights = self.model.step(self.pictures, last, state)
        if k == 1:
            ids = logits.argmax(dim=-1, keepdim=True)
            return Words(logits.gather(-1, ids), ids, state, weights)
        values, ids = logits.log_softmax(dim=-1).topk(k)
        return Words(values, ids, state, weights)


class FusedPictures(NamedTuple):
    """table [V, H] (`word_table`), by_summary [B, 1, H], key and value as in EncodedImages."""

    table: Tensor
    by_summary: Tensor
    key: Tensor
    value: Tensor


class FusedDecoder:
    """The step with what repeats taken out of it, and a vocabulary of which no logit is stored.

    relu(join_input(summary, embedding)) is the relu of a sum: the summary's half is made once for
    each image, the embedding's once for each word (`word_table`), and
    what attention makes of the keys once for all steps (`for_steps`).
    """

    def __init__(
        self,
        model: StepModel,
        pictures: FusedPictures,
        keys: AdditiveAttentionKeys | None = None,
    ) -> None:
        self.model, self.pictures = model, pictures
        self.key = pictures.key if keys is None else keys

    @classmethod
    def of(cls, model: StepModel, encoded: EncodedImages) -> FusedDecoder:
        join, split = model.join_input, encoded.summary.shape[-1]
        by_summary = F.linear(encoded.summary, join.weight[:, :split], join.bias).unsqueeze(1)
        return cls(model, FusedPictures(word_table(model), by_summary, encoded.key, encoded.value))

    def for_pictures(self, pictures: FusedPictures) -> FusedDecoder:
        return FusedDecoder(self.model, pictures)

    def for_steps(self) -> FusedDecoder:
        if self.model.config.attention != "additive" or torch.is_grad_enabled():
            return self
        keys = additive_attention_keys(self.pictures.key)
        return FusedDecoder(self.model, self.pictures, keys)

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words:
        model, pictures = self.model, self.pictures
        # Autocast may have made one of them in its own dtype.
        x = torch.relu_(F.embedding(last, pictures.table) + pictures.by_summary)
        hidden, state, weights = model.advance(x, state, self.key, pictures.value)
        head = model.head
        values, ids = linear_topk(hidden, head.weight, head.bias, k)
        return Words(values, ids, state, weights)


def decoder_for(model: StepModel, encoded: EncodedImages) -> Decoder:
    if model.layers == "mbm":
        return FusedDecoder.of(model, encoded)
    return StockDecoder(model, encoded)


class _Kept(NamedTuple):
    versions: tuple[packing.Version | None, ...]
    table: Tensor


_tables: weakref.WeakKeyDictionary[StepModel, _Kept] = weakref.WeakKeyDictionary()


def word_table(model: StepModel) -> Tensor:
    """join_input's product with the embedding of each word, [V, H].

    On CPU it is kept as packed weights are, while a hash of both weights stays (packing.py). A hash
    costs a GPU more than the product.
    """
    words, weight = model.embedding.weight, model.join_input.weight
    kept_here = words.is_cpu and not autocast.enabled(words.device) and is_plain((words, weight))
    if not kept_here:
        return _word_table(words, weight)
    versions = (packing.version_of(words), packing.version_of(weight))
    kept = _tables.get(model)
    if kept is None or kept.versions != versions:
        kept = _tables[model] = _Kept(versions, _word_table(words, weight))
    return kept.table


def _word_table(words: Tensor, weight: Tensor) -> Tensor:
    # One made in inference mode could not be used by a call outside it.
    with torch.inference_mode(False), torch.no_grad():
        return F.linear(words, weight[:, -words.shape[1] :])
