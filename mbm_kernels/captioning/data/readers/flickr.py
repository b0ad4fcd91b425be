"""Flickr8k's and Flickr30k's `.token` files: `name#i`, a tab, the caption."""

from __future__ import annotations

import io
import re
from pathlib import Path

from .listing import Listing, read_text, split_in

LINE = re.compile(r"\s*([^\t]+?)#(\d+)\s*\t(.*)", re.DOTALL)


def read_token(path: Path) -> Listing:
    """Captions by `name#i`; splits by the lists of names beside it, as Flickr8k has them."""
    listing = Listing("Flickr", path.parent)
    splits = _splits_beside(path)
    for number, line in enumerate(io.StringIO(read_text(path), newline=""), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        found = LINE.fullmatch(line)
        if found is None:
            listing.skipped.add(
                "line", where, "it is not name#i, a tab and a caption", line.strip()
            )
            continue
        name = found[1].strip()
        listing.add(name, [found[3]], where, split=splits.get(name))
    return listing


def _splits_beside(path: Path) -> dict[str, str]:
    """Of `Flickr_8k.trainImages.txt` and the like."""
    out: dict[str, str] = {}
    for names in sorted(path.parent.glob("*Images.txt")):
        split = split_in(names.stem.removesuffix("Images"))
        if split is not None:
            out |= dict.fromkeys(read_text(names).split(), split)
    return out
