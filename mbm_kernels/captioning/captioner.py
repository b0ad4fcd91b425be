"""A trained captioner in one object: images in, captions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mbm_kernels import models
from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import WordTokenizer, normalise
from mbm_kernels.captioning.pictures import pixels_of
from mbm_kernels.captioning.stored import Which
from mbm_kernels.models import Sampling

BATCH = 64  # images captioned at a time
MAX_LENGTH = 24  # words of a caption

Picture = str | Path | Image.Image | Tensor


class Caption(NamedTuple):
    """A caption, its words, and the attention of each over the image's positions, [length, S]."""

    text: str
    words: list[str]
    weights: Tensor


class Captioner:
    """A model and the tokenizer that it was trained with.

    Args:
        model: on any device. tokenizer: of the same vocabulary.
    """

    def __init__(self, model: models.Captioner, tokenizer: WordTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        layers: str = "mbm",
        which: Which = "best",
        device: str | torch.device = "cpu",
    ) -> Captioner:
        """What `mbm-kernels caption train` or `distill` wrote.

        Args:
            path: a run's folder, or one checkpoint of it.
            layers: "mbm", or "stock" for PyTorch's.
            which: of a run's checkpoints, "best" or "latest".

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: what is there is damaged or is something else.
        """
        found = checkpoint.load(path, layers=layers, which=which)
        return cls(found.model.to(device), found.tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels; others are scaled to it and padded with white."""
        return self.model.image_size

    def generate(
        self,
        images: Picture | Iterable[Picture],
        *,
        max_length: int = MAX_LENGTH,
        beam: int = 1,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """A caption for each image.

        Args:
            images: one, or any iterable: paths, PIL images, tensors [3, Y, X] or [B, 3, Y, X] in
                RGB, uint8 or floats from 0 to 1; of any size, turned upright by EXIF,
                transparency on white.
            max_length: the most words of a caption.
            beam: hypotheses kept for each image; 1 is greedy.
            sampling: draw the words instead, by `sampling.seed` and the image's place.

        Raises:
            FileNotFoundError: there is no such file. ValueError: a file that does not decode, a
            tensor of another shape or range, or an option out of its bounds. TypeError: no image.
        """
        texts: list[str] = []
        pixels = self._pixels(images)
        while batch := list(islice(pixels, BATCH)):
            found = self.describe(
                torch.stack(batch),
                max_length=max_length,
                beam=beam,
                sampling=sampling,
                first=len(texts),
            )
            texts += [caption.text for caption in found]
        return texts

    def describe(
        self,
        pixels: Tensor,
        *,
        max_length: int = MAX_LENGTH,
        beam: int = 1,
        sampling: Sampling | None = None,
        first: int = 0,
    ) -> list[Caption]:
        """Captions with their attention, of uint8 [B, 3, Y, X] as the model takes them.

        Args:
            first: the place of the first image among all, for `sampling`.
        """
        if sampling is not None:
            sampling = sampling.after(first)
        device = self.model.head.weight.device
        images = normalise(pixels).to(device)
        tokens, weights = self.model.generate(images, max_length, beam, True, sampling)
        decode = self.tokenizer.decode
        return [
            Caption(decode(row), [decode([token]).strip() for token in row], maps)
            for row, maps in zip(tokens, weights, strict=True)
        ]

    def _pixels(self, images: Picture | Iterable[Picture]) -> Iterator[Tensor]:
        if isinstance(images, str | Path | Image.Image) or (
            isinstance(images, Tensor) and images.dim() == 3
        ):
            images = [images]
        if not isinstance(images, Iterable):
            raise TypeError(
                f"images: got {type(images).__name__}, expected images or an iterable of them; "
                "give paths, PIL images or tensors"
            )
        for place, image in enumerate(images):
            yield pixels_of(image, str(place), self.image_size)
