"""Captions for image files, and their attention drawn over the image."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from mbm_kernels._core.files import write_atomic
from mbm_kernels.captioning.data import WordTokenizer, normalise
from mbm_kernels.captioning.data.readers import image_files
from mbm_kernels.captioning.pictures import read_picture as read_picture
from mbm_kernels.models import Captioner

TILE = 128  # pixels of one image of an attention sheet
LABEL = 16  # pixels of the word below it
BATCH = 64  # images captioned at a time


def read_batches(
    paths: Sequence[Path], image_size: int, left: Callable[[str], object]
) -> Iterator[list[tuple[Path, Tensor]]]:
    """Image files, and those below folders, as uint8 [3, Y, X] with their paths, by the batch.

    Args:
        left: called with a line on each file of a folder that does not decode.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it does not decode, or a folder holds
            no image file; either before the first batch.
    """
    named = {path: read_picture(path, image_size) for path in paths if not path.is_dir()}
    below = {path: image_files(path) for path in paths if path.is_dir()}
    for folder, names in below.items():
        if not names:
            raise ValueError(f"pictures: got {folder}, a folder without images, expected some")
    batch: list[tuple[Path, Tensor]] = []
    for path in paths:
        for file in [path] if path in named else [path / name for name in below[path]]:
            try:
                pixels = named[file] if file in named else read_picture(file, image_size)
            except (ValueError, OSError) as error:
                left(str(error))
                continue
            batch.append((file, pixels))
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def caption_pictures(
    model: Captioner,
    pictures: Tensor,
    tokenizer: WordTokenizer,
    *,
    max_length: int = 24,
    beam: int = 1,
) -> tuple[list[str], list[list[str]], list[Tensor]]:
    """Of uint8 [B, 3, Y, X]: captions, their words, and the attention [length, S] of each."""
    tokens, weights = model.generate(normalise(pictures), max_length, beam, True)
    texts = [tokenizer.decode(row) for row in tokens]
    words = [[tokenizer.decode([token]).strip() for token in row] for row in tokens]
    return texts, words, weights


def attention_overlay(picture: Tensor, weights: Tensor) -> Image.Image:
    """An image uint8 [3, Y, X] under its attention [S] of one word, bright where attended."""
    side = int(weights.numel() ** 0.5)
    peak = float(weights.max())
    level = weights.reshape(side, side).float() / (peak if peak > 0 else 1.0)
    mask = Image.fromarray((level * 255).byte().cpu().numpy(), "L")
    mask = mask.resize((TILE, TILE), Image.Resampling.BICUBIC)
    shown = Image.fromarray(picture.permute(1, 2, 0).numpy(), "RGB")
    shown = shown.resize((TILE, TILE), Image.Resampling.BICUBIC)
    dark = Image.blend(shown, Image.new("RGB", shown.size, "black"), 0.75)
    return Image.composite(shown, dark, mask)


def save_attention_sheet(
    path: Path, picture: Tensor, words: Sequence[str], weights: Tensor
) -> None:
    """Write a PNG with one overlay per word, side by side.

    Raises:
        OSError: if it cannot be written; a sheet that was there stays.
    """
    sheet = Image.new("RGB", (TILE * max(1, len(words)), TILE + LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (word, row) in enumerate(zip(words, weights, strict=True)):
        sheet.paste(attention_overlay(picture, row), (place * TILE, 0))
        draw.text((place * TILE + 4, TILE + 2), word, fill="black")
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_atomic(path, content.getvalue())
