"""What the model, its decoder, search and the recorded loop hand to each other.

B batch, K hypotheses of an image, S positions of the feature map; A, D, H widths of attention,
features and the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mbm_kernels.models.captioner_config import CaptionerConfig
from mbm_kernels.ops.additive_attention import AdditiveAttentionKeys


class EncodedImages(NamedTuple):
    """What decoding needs of the images, computed once.

    features [B, S, D], summary [B, D], key (projected, [B, S, A] or [B, N, S, D/N]), value, and
    the decoder's first state [B, H].
    """

    features: Tensor
    summary: Tensor
    key: Tensor
    value: Tensor
    state: Tensor


class StepModel(Protocol):
    """What search asks of a model."""

    @property
    def layers(self) -> str: ...
    @property
    def config(self) -> CaptionerConfig: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def embedding(self) -> nn.Embedding: ...
    @property
    def join_input(self) -> Any: ...
    @property
    def head(self) -> nn.Linear: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def step(
        self, encoded: EncodedImages, tokens: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def advance(
        self, x: Tensor, state: Tensor, key: Tensor | AdditiveAttentionKeys, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Words(NamedTuple):
    """values and ids [B, K, k], state [B, K, H], weights [B, K, S]."""

    values: Tensor
    ids: Tensor
    state: Tensor
    weights: Tensor


class Decoder(Protocol):
    @property
    def pictures(self) -> tuple[Tensor, ...]: ...

    def __call__(self, last: Tensor, state: Tensor, k: int) -> Words: ...

    def for_pictures(self, pictures: Any) -> Decoder:
        """The same for other images."""

    def for_steps(self) -> Decoder:
        """The same, with what its steps have in common made once of the images as they are."""


class Carry(NamedTuple):
    """State handed from step to step: last, done, length and score [B, K], state [B, K, H]."""

    last: Tensor
    done: Tensor
    length: Tensor
    score: Tensor
    state: Tensor


class Trace(NamedTuple):
    """What steps leave: words, the hypotheses they extend [..., B, K], weights [..., B, K, S]."""

    words: Tensor
    parents: Tensor
    weights: Tensor


class Search(Protocol):
    beam: int

    def step(self, decoder: Decoder, carry: Carry) -> tuple[Carry, Trace]: ...


def stacked(traces: list[Trace]) -> Trace:
    return Trace(*map(torch.stack, zip(*traces, strict=True)))


def joined(traces: list[Trace]) -> Trace:
    return Trace(*map(torch.cat, zip(*traces, strict=True)))
