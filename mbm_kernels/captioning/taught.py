"""The teacher's outputs for every image of a set, computed once instead of once in each epoch."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.models import Captioner

BATCH = 128  # fixed, so that a resumed run gets the same bits
MOST_BYTES = 2 << 30


class Taught(NamedTuple):
    """What a student learns from.

    features: the teacher's, [B, S, D]. hidden: its states [B, T, H], or else topk: ids and
    log-probabilities [B, T, k] of its likeliest words.
    """

    features: Tensor
    hidden: Tensor | None = None
    topk: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> Taught:
        hidden = None if self.hidden is None else self.hidden.to(device)
        topk = None if self.topk is None else (self.topk[0].to(device), self.topk[1].to(device))
        return Taught(self.features.to(device), hidden, topk)


class Teaching(Protocol):
    """What a teacher says of a set, computed beforehand."""

    def batch(self, rows: Tensor) -> Taught:
        """Of some captions, int64 [B]."""

    def identity(self) -> dict[str, int]:
        """What must be the same for a resumed training to be the same."""


def checksum(model: nn.Module) -> str:
    """SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def starts_of(lengths: Tensor) -> Tensor:
    """Where each caption's words begin among those of all, int64 [N]."""
    return lengths.cumsum(0) - lengths


def place_of(rows: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the words of some captions are, int64 [B, T], and which are there, bool [B, T].

    Where there is none, its place is 0.
    """
    place = torch.arange(int(lengths[rows].max()))
    real = place < lengths[rows, None]
    return (starts[rows, None] + place) * real, real


class TaughtSet:
    """Float32 outputs of a teacher in eval mode for the N images of a set and their captions."""

    def __init__(self, teacher: Captioner, images: CaptionSet, tokenizer: WordTokenizer) -> None:
        hidden, features, lengths = [], [], []
        device = next(teacher.parameters()).device
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                rows = range(start, min(start + BATCH, len(images)))
                pixels, tokens, length = collate(images, rows, tokenizer)
                output = teacher(pixels.to(device), tokens[:, :-1].to(device))
                features.append(output.features.cpu())
                predicted = torch.arange(tokens.shape[1] - 1) < (length - 1)[:, None]
                hidden.append(output.hidden.cpu()[predicted])
                lengths.append(length - 1)
        self.features = torch.cat(features)  # [N, S, D]
        self.hidden = torch.cat(hidden)  # [sum of the lengths, H]
        self.lengths = torch.cat(lengths)  # [N], predicted words of each caption
        self.starts = starts_of(self.lengths)

    @classmethod
    def if_worth(
        cls,
        teacher: Captioner,
        images: CaptionSet,
        tokenizer: WordTokenizer,
        settings: TrainSettings,
    ) -> TaughtSet | None:
        """None where each image is new (augmentation), seen about once, or memory is short."""
        seen = settings.steps * settings.batch_size
        if settings.augment or seen <= len(images):
            return None
        positions = len(teacher.encoder.positions)
        words = max(len(tokenizer.encode(caption)) for caption in images.captions)
        each = positions * teacher.feature_size + words * teacher.hidden_size
        if 4 * each * len(images) > MOST_BYTES:
            return None
        return cls(teacher.eval(), images, tokenizer)

    def identity(self) -> dict[str, int]:
        return {}  # they are the teacher's own

    def batch(self, rows: Tensor) -> Taught:
        """The outputs for some images; hidden is 0 past a caption's end, where nothing reads it."""
        place, real = place_of(rows, self.starts, self.lengths)
        hidden = self.hidden[place]
        return Taught(self.features[rows], hidden * real[..., None])
