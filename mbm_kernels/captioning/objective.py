"""What a training minimises, as the loop knows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate

BATCH = 128


class Loss(NamedTuple):
    """The total to minimise and its parts by name, all scalars."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """A model and its loss on images float [B, 3, Y, X] and captions int64 [B, T + 1].

    model: with `layers` and `settings`. Its forward takes images, tokens, and `inputs` [B, T], the
    tokens but the last with some words hidden.
    """

    model: Any

    @torch.no_grad()
    def held_out_loss(self, caption_set: CaptionSet, tokenizer: WordTokenizer, limit: int) -> float:
        """Mean loss in eval mode, by image, of the first `limit` images; the same at each call."""
        was_training = self.training
        self.eval()
        total, count = 0.0, min(limit, len(caption_set))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for start in range(0, count, BATCH):
                rows = range(start, min(start + BATCH, count))
                images, tokens, _ = collate(caption_set, rows, tokenizer)
                total += float(self(images, tokens).total) * len(rows)
        self.train(was_training)
        return total / count
