"""Which split an image belongs to: the one that is given, or one that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DRAWN = {"val": 0.1, "test": 0.1}  # the rest is train
LEAST = 3  # different images to draw from: one for each split


def ranked(checksums: Sequence[str], seed: int) -> list[int]:
    """Places in an order that is random but for this: images of the same content are neighbours.

    An image's rank comes from its content and the seed alone, so that it changes by little when
    others are added or removed.
    """
    keys = [hashlib.sha256(f"{seed}/{checksum}".encode()).digest() for checksum in checksums]
    return sorted(range(len(keys)), key=lambda place: (keys[place], place))


def assign(
    given: Sequence[str | None], checksums: Sequence[str], seed: int
) -> dict[str, list[int]]:
    """Places of each split, in the order of `ranked`.

    Given splits are kept, and images without one are of `train`. Where none is given, a tenth of
    the different images is drawn for `val` and another for `test`; images of the same content come
    into the same split.
    """
    order = ranked(checksums, seed)
    chosen: dict[str, list[int]] = {"train": []}
    if any(split is not None for split in given):
        for place in order:
            chosen.setdefault(given[place] or "train", []).append(place)
        usual = [split for split in ("train", *DRAWN) if chosen.get(split)]
        others = sorted(chosen.keys() - {"train", *DRAWN})
        return {split: chosen[split] for split in (*usual, *others)}
    different = list(dict.fromkeys(checksums[place] for place in order))
    split_of: dict[str, str] = {}
    start = 0
    for split, share in DRAWN.items():
        count = max(1, round(share * len(different))) if len(different) >= LEAST else 0
        split_of |= dict.fromkeys(different[start : start + count], split)
        start += count
    chosen |= {split: [] for split in DRAWN}
    for place in order:
        chosen[split_of.get(checksums[place], "train")].append(place)
    return {split: places for split, places in chosen.items() if places}
