"""Tux Paint's stamps: photographs and drawings of things with one English sentence each.

From the Debian package tuxpaint-stamps-default, fetched by name at the user's request (GPL-2,
copyright 2002-2022 by Bill Kendrick and contributors). Its 785 PNG files with a text are taken;
the SVG files and mirrored pictures are not.
"""

from __future__ import annotations

from collections.abc import Iterator

from .debian import DebianSet, Files, Samples

LEAST = 500  # of the 785 in version 2022.06.04


def _shards(files: Files) -> dict[str, Samples]:
    return {"stamps": _samples(files)}


def _samples(files: Files) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Pictures with the first line of their text, which is the English one."""
    pictures: dict[str, bytes] = {}
    texts: dict[str, bytes] = {}
    for path, content in files:
        stem, _, suffix = path.rpartition(".")
        if suffix == "png":
            pictures[stem] = content
        else:
            texts[stem] = content.partition(b"\n")[0].strip()
    both = sorted(stem for stem in pictures.keys() & texts.keys() if texts[stem])
    if len(both) < LEAST:
        raise ValueError(
            f"tuxpaint: got {len(both)} pictures with a text, expected {LEAST} at least; fetch "
            "the package again"
        )
    for stem in both:
        # Before the first dot is the key of a shard's sample.
        yield stem.replace(".", "-"), {"png": pictures[stem], "txt": texts[stem]}


TUXPAINT = DebianSet(
    "tuxpaint", "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", (".png", ".txt"), _shards
)
