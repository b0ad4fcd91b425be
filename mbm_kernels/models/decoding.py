"""One word of each hypothesis: the captioner's step as search calls it.

A `Decoder` maps the last words [B, K] and states [B, K, H] to log-probabilities and ids of the k
likeliest words [B, K, k], the new states and the attention weights [B, K, S]. All that differs from
picture to picture is in `pictures`, so that a recorded loop can be run again on other pictures.

K hypotheses of one picture are K queries over the same keys, so nothing of the picture is copied.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import autocast, native
from mbm_kernels.ops.linear_topk import linear_topk

if TYPE_CHECKING:
    from mbm_kernels.models.captioner import Captioner, EncodedImages

Version = tuple[tuple[int, int, int, torch.dtype], ...]


class Words(NamedTuple):
    """values and ids [B, K, k], state [B, K, H], weights [B, K, S]."""

    values: Tensor
    ids: Tensor
    state: Tensor
    weights: Tensor


class Decoder(Protocol):
    @property
    def pictures(self) -> tuple[Tensor, ...]: ...

    @property
    def made(self) -> tuple[Tensor, ...]:
        """What was made of the weights."""

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words: ...

    def for_pictures(self, pictures: Any) -> Decoder:
        """The same for other pictures."""


class StockDecoder:
    """`Captioner.step`, then what a user of PyTorch writes: argmax, or log_softmax and topk.

    topk leaves open which of equal words it takes; argmax takes the lowest id.
    """

    made = ()

    def __init__(self, model: Captioner, encoded: EncodedImages) -> None:
        self.model, self.pictures = model, encoded

    def for_pictures(self, pictures: EncodedImages) -> StockDecoder:
        return StockDecoder(self.model, pictures)

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words:
        logits, state, weights = self.model.step(self.pictures, last, state)
        if k == 1:
            ids = logits.argmax(dim=-1, keepdim=True)
            return Words(logits.gather(-1, ids), ids, state, weights)
        values, ids = logits.log_softmax(dim=-1).topk(k)
        return Words(values, ids, state, weights)


class FusedPictures(NamedTuple):
    """by_summary [B, 1, H], key and value as in EncodedImages."""

    by_summary: Tensor
    key: Tensor
    value: Tensor


class FusedDecoder:
    """The step with what repeats taken out of it, and a vocabulary of which no logit is stored.

    relu(join_input(summary, embedding)) is the relu of a sum: the summary's half is made once for
    each picture, the embedding's once for each word and version of the weights (`word_table`).
    """

    def __init__(self, model: Captioner, table: Tensor, pictures: FusedPictures) -> None:
        self.model, self.table, self.pictures = model, table, pictures

    @classmethod
    def of(cls, model: Captioner, encoded: EncodedImages) -> FusedDecoder:
        join, split = model.join_input, encoded.summary.shape[-1]
        by_summary = F.linear(encoded.summary, join.weight[:, :split], join.bias).unsqueeze(1)
        pictures = FusedPictures(by_summary, encoded.key, encoded.value)
        return cls(model, word_table(model), pictures)

    def for_pictures(self, pictures: FusedPictures) -> FusedDecoder:
        return FusedDecoder(self.model, self.table, pictures)

    @property
    def made(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words:
        model, pictures = self.model, self.pictures
        # Autocast may have made one of them in its own dtype.
        x = torch.relu_(F.embedding(last, self.table) + pictures.by_summary)
        hidden, state, weights = model.advance(x, state, pictures.key, pictures.value)
        head = model.head
        values, ids = linear_topk(hidden, head.weight, head.bias, k)
        return Words(values, ids, state, weights)


def decoder_for(model: Captioner, encoded: EncodedImages) -> Decoder:
    if model.layers == "mbm":
        return FusedDecoder.of(model, encoded)
    return StockDecoder(model, encoded)


def version_of(*tensors: Tensor) -> Version | None:
    """Changes when a tensor is written in place or replaced; None where none is counted."""
    if any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version, native.sample(t), t.dtype) for t in tensors)


class _Kept(NamedTuple):
    version: Version
    table: Tensor


_tables: weakref.WeakKeyDictionary[Captioner, _Kept] = weakref.WeakKeyDictionary()


def word_table(model: Captioner) -> Tensor:
    """join_input's product with the embedding of each word, [V, H]; kept until a weight changes."""
    words, weight = model.embedding.weight, model.join_input.weight
    version = None if autocast.enabled(words.device) else version_of(words, weight)
    kept = _tables.get(model)
    if kept is not None and kept.version == version:
        return kept.table
    table = F.linear(words, weight[:, -words.shape[1] :]).detach()
    if version is None:
        return table
    _tables[model] = _Kept(version, table)
    return table
