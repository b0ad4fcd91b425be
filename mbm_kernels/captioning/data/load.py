"""One door to every data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import emoji, own, scenes
from .base import CaptionSet
from .fashion import FASHION
from .tuxpaint import TUXPAINT

DEBIAN = {one.name: one for one in (TUXPAINT, FASHION)}
NAMES = ("scenes", "emoji", *DEBIAN)


def fetch(
    name: str,
    cache_dir: str | Path | None = None,
    from_dir: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path | None:
    """Fetch what a built-in data set needs; returns its folder, None for scenes, which are drawn.

    Raises:
        RuntimeError: it cannot be fetched. ValueError: what was fetched does not fit.
    """
    if name == "scenes":
        return None
    prepare = emoji.prepare if name == "emoji" else DEBIAN[name].prepare
    return prepare(cache_dir, from_dir, progress)


def load(
    name: str | Path,
    *,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int = 64,
    limit: int | None = None,
    images: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, CaptionSet]:
    """The splits of a data set: the same seed gives the same images.

    Args:
        name: "scenes" (splits `train`, `val`, `held_out`) or "emoji" (`train`, `held_out`,
            `unseen_style`), "tuxpaint" (`train`, `val`, `test`), "fashion" (`train`, `test`), or
            the path of captions as `own.prepare` takes it (splits as it finds
            or draws them, `train`, `val` and `test`).
        seed: of the drawing (scenes), of the choice of held-out combinations (emoji). A path's
            splits are those of its manifest.
        root: the folder that `fetch` returned, None for the one in the default cache; of scenes
            and paths unused.
        image_size: side of the images in pixels.
        limit: keep only the first `limit` images of each split.
        images: of a path: the folder that its image names are relative to.
        progress: of a path: called with lines of text while it is prepared.

    Raises:
        ValueError: unknown name, an impossible size or limit, a folder that is missing, empty or
            incomplete, a truncated image.
    """
    is_own = name not in NAMES and Path(name).exists()
    if name not in NAMES and not is_own:
        raise ValueError(
            f"load: got data set {str(name)!r}, expected one of {NAMES} or the path of captions; "
            "name one of them"
        )
    if images is not None and not is_own:
        raise ValueError(
            f"load: images: got {images} for {name}, expected None; a built-in set has its own"
        )
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
    if is_own or name in DEBIAN:
        source = name if is_own else DEBIAN[str(name)].folder_of(root)
        sets = own.load(source, images, image_size=image_size, limit=limit, progress=progress)
    elif name == "scenes":
        sets = scenes.splits(seed=seed, image_size=image_size, limit=limit)
    else:
        sets = emoji.splits(seed=seed, root=root, image_size=image_size, limit=limit)
    return {split: replace(one, source=str(name)) for split, one in sets.items()}


def train_of(name: str | Path, sets: dict[str, CaptionSet]) -> CaptionSet:
    """The split to train on.

    Raises:
        ValueError: there is none.
    """
    if "train" not in sets:
        raise ValueError(
            f"data {name}: got the splits {', '.join(sets)}, expected train among them; name it so "
            "in the file"
        )
    return sets["train"]
