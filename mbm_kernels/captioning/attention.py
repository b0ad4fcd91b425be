"""The attention of a caption's words, drawn over the image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from mbm_kernels._core.files import write_atomic

TILE = 128  # pixels of one image of an attention sheet
LABEL = 16  # pixels of the word below it


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
