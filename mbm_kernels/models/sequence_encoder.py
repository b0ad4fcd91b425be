"""Sequences to one vector each: a GRU's state after the last step, over words or features.

B batch, T steps, E embedding, C features of a step, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mbm_kernels._core import checks
from mbm_kernels.models.layers import Layers


class SequenceEncoder(nn.Module):
    """x [B, T, C], lengths int64 [B] or None -> the state after each row's last step, [B, H]."""

    def __init__(self, features: int, hidden: int, layers: Layers) -> None:
        super().__init__()
        self.gru = layers.gru(features, hidden, batch_first=True)
        self.last_state = layers.last_state

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.last_state(self.gru, x, lengths)


class TextEncoder(nn.Module):
    """tokens int64 [B, T], lengths int64 [B] or None -> the state after the last word, [B, H]."""

    def __init__(
        self, vocab_size: int, embedding: int, hidden: int, pad_id: int, layers: Layers
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=pad_id)
        self.sequence = SequenceEncoder(embedding, hidden, layers)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.sequence(self.embedding(tokens), lengths)


def check_tokens(model: str, name: str, tokens: Tensor) -> None:
    """int64 [B, T] with T > 0; values are the embedding's to check."""
    checks.tensor(model, name, tokens, 2)
    if tokens.dtype != torch.int64:
        checks.fail(model, name, tokens.dtype, "int64", "convert it with .long()", TypeError)
    _check_steps(model, name, tokens)


def check_sequence(model: str, name: str, x: Tensor, features: int) -> None:
    """Floating [B, T, features] with T > 0."""
    checks.tensor(model, name, x, 3)
    checks.shape(model, name, x, "B, T, C", (*x.shape[:2], features))
    if not x.is_floating_point():
        checks.fail(model, name, x.dtype, "floats", "convert it with .float()", TypeError)
    _check_steps(model, name, x)


def _check_steps(model: str, name: str, x: Tensor) -> None:
    if x.shape[1] == 0:
        got, expected = f"shape {list(x.shape)}", "at least one step"
        checks.fail(model, name, got, expected, "pad it to one step and give its length as 0")
