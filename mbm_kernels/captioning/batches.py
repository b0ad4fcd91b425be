"""What a step is computed from: its rows, in parts of which each process has its own.

The rows of a step, their augmentation and the words that are hidden depend on (seed, step) alone,
so that one process, several of them, and parts one after another see the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, augment
from mbm_kernels.captioning.data.base import images_of, texts_of
from mbm_kernels.captioning.objective import Share
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.seeding import mix_seed
from mbm_kernels.captioning.style import restyle


@dataclass(frozen=True)
class Part:
    """Some rows of a step's batch.

    number: its place among the parts. rows: int64 [B], into the set. images: float [B, 3, Y, X].
    tokens: int64 [B, T + 1]. inputs: [B, T], the tokens but the last with some words hidden. share:
    of the batch.
    """

    number: int
    rows: Tensor
    images: Tensor
    tokens: Tensor
    inputs: Tensor
    share: Share


class Batches:
    """The batches of a run by step.

    Raises:
        ValueError: the set has fewer captions than a batch, or a batch fewer rows than parts.
    """

    def __init__(
        self,
        caption_set: CaptionSet,
        tokenizer: WordTokenizer,
        settings: TrainSettings,
        seed: int,
        parts: int,
    ) -> None:
        size = settings.batch_size
        if len(caption_set) < size:
            raise ValueError(
                f"train_set: got {len(caption_set)} pictures, expected at least batch_size = "
                f"{size}; take a smaller batch_size"
            )
        if size < parts:
            raise ValueError(
                f"batch_size: got {size}, expected at least {parts}, a row for each of accumulate "
                f"= {settings.accumulate} parts in each process; give a larger batch"
            )
        self.caption_set, self.tokenizer = caption_set, tokenizer
        self.settings, self.seed, self.count = settings, seed, parts
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, step: int) -> Tensor:
        """Rows of a step: each epoch its own permutation, an incomplete last batch dropped."""
        size = self.settings.batch_size
        epoch, place = divmod(step, len(self.caption_set) // size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, -1 - epoch))
            self._order = torch.randperm(len(self.caption_set), generator=generator)
            self._epoch = epoch
        return self._order[place * size : (place + 1) * size]

    def parts(self, step: int, wanted: Sequence[int]) -> Iterator[Part]:
        """Some of a step's parts, in order; words are hidden by torch's generator as it is now."""
        rows = self.rows(step)
        tokens, lengths = texts_of(self.caption_set, rows.tolist(), self.tokenizer)
        inputs = mask_words(tokens[:, :-1], self.settings.word_dropout, self.tokenizer)
        words = int((lengths - 1).sum())
        for number, place in enumerate(torch.arange(len(rows)).tensor_split(self.count)):
            if number not in wanted:
                continue
            length = int(lengths[place].max())
            yield Part(
                number,
                rows[place],
                self._images(step, rows[place], (int(place[0]), len(rows))),
                tokens[place, :length],
                inputs[place, : length - 1],
                Share(len(place) / len(rows), int((lengths[place] - 1).sum()) / words),
            )

    def _images(self, step: int, rows: Tensor, part: tuple[int, int]) -> Tensor:
        images = images_of(self.caption_set, rows.tolist())
        if not self.settings.augment:
            return images
        generator = torch.Generator().manual_seed(mix_seed(self.seed, step))
        return restyle(augment(images, generator, part), generator, part)


def mask_words(inputs: Tensor, share: float, tokenizer: WordTokenizer) -> Tensor:
    """Input words [B, T] of which a share reads as unknown, so that the image must tell."""
    if share == 0:
        return inputs
    hide = (torch.rand(inputs.shape) < share) & (inputs > tokenizer.unk_id)
    return inputs.masked_fill(hide, tokenizer.unk_id)
