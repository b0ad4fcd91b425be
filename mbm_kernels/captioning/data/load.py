"""One door to both data sets."""

from __future__ import annotations

from pathlib import Path

from . import emoji, scenes
from .base import CaptionSet

NAMES = ("scenes", "emoji")


def load(
    name: str,
    *,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int = 64,
    limit: int | None = None,
) -> dict[str, CaptionSet]:
    """The splits of a data set: the same seed gives the same images.

    Args:
        name: "scenes" (splits `train`, `val`, `held_out`) or "emoji" (`train`, `held_out`,
            `unseen_style`).
        seed: of the drawing (scenes), of the choice of held-out combinations (emoji).
        root: emoji: the folder that `emoji.prepare` returned, None for the one in the default
            cache. scenes: unused.
        image_size: side of the images in pixels.
        limit: keep only the first `limit` images of each split.

    Raises:
        ValueError: unknown name, an impossible size or limit, a folder that is missing, empty or
            incomplete, a truncated image.
    """
    if name not in NAMES:
        raise ValueError(f"load: got data set {name!r}, expected one of {NAMES}; name one of them")
    if image_size < 16:
        raise ValueError(
            f"load: image_size: got {image_size}, expected at least 16; the default is 64"
        )
    if limit is not None and limit < 1:
        raise ValueError(
            f"load: limit: got {limit}, expected None or at least 1; None takes every picture"
        )
    if seed < 0:
        raise ValueError(f"load: seed: got {seed}, expected 0 or more; the default is 0")
    if name == "scenes":
        return scenes.splits(seed=seed, image_size=image_size, limit=limit)
    return emoji.splits(seed=seed, root=root, image_size=image_size, limit=limit)
