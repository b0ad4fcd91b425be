"""What a training minimises, as the loop knows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mbm_kernels.captioning import processes
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.data.base import columns_of

BATCH = 128


class Loss(NamedTuple):
    """The total to minimise and its parts by name, all scalars."""

    total: Tensor
    parts: dict[str, Tensor]


class Share(NamedTuple):
    """How much of a batch some of its rows are, of the rows and of the predicted words: 0..1."""

    rows: float = 1.0
    words: float = 1.0


WHOLE = Share()


class Objective(nn.Module):
    """A model and its loss on images float [B, 3, Y, X] and captions int64 [B, T + 1].

    model: with `layers` and `settings`. Its forward takes images, tokens, and `inputs` [B, T], the
    tokens but the last with some words hidden, and the columns of the set by name. separable:
    whether forward takes `share` too and gives terms whose sum over the parts of a batch is the
    loss of the batch; elsewhere the rows of a batch depend on one another.
    """

    model: Any
    separable = False

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed training to be the same, JSON-able."""
        return {}

    def held_out(self, images: Tensor, tokens: Tensor, **columns: Tensor) -> tuple[Tensor, float]:
        """The loss of held-out images, a scalar, and its weight in the mean over batches."""
        return self(images, tokens, **columns).total, float(len(images))

    @torch.no_grad()
    def held_out_loss(self, caption_set: CaptionSet, tokenizer: WordTokenizer, limit: int) -> float:
        """Mean loss in eval mode of the first `limit` captions; the same at each call.

        The processes of a group each compute some batches, and all get the mean of all.
        """
        was_training = self.training
        self.eval()
        device = next(self.parameters()).device
        count = min(limit, len(caption_set))
        starts = range(0, count, BATCH)
        total = weights = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for turn in range(0, len(starts), processes.world()):
                mine = turn + processes.rank()
                # A process without a batch repeats the last one: some forwards are collective.
                start = starts[min(mine, len(starts) - 1)]
                rows = range(start, min(start + BATCH, count))
                images, tokens, _ = collate(caption_set, rows, tokenizer)
                columns = columns_of(caption_set, rows, device)
                loss, weight = self.held_out(images.to(device), tokens.to(device), **columns)
                if mine < len(starts):
                    total += float(loss) * weight
                    weights += weight
        self.train(was_training)
        total, weights = processes.summed([total, weights], device)
        return total / weights
