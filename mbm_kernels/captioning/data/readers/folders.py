"""A folder of images with a text file of the same stem each, one caption a line."""

from __future__ import annotations

import os
from pathlib import Path

from .listing import SPLITS, SUFFIXES, Listing, read_text

TEXTS = (".txt", ".caption")
MOST_TEXT_BYTES = 1 << 20


def image_files(folder: Path) -> list[str]:
    """Names of the image files below a folder, relative and sorted; links are not entered."""
    return [name for name in _files(folder) if _suffix(name) in SUFFIXES]


def read_folder(folder: Path) -> Listing:
    """Images and texts below a folder; folders named train, val or test at its top are splits."""
    listing = Listing("folder", folder, splits_by_name=True)
    texts: dict[str, str] = {}
    images: dict[str, list[str]] = {}
    for name in _files(folder):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in TEXTS:
            texts[stem] = name
        elif _suffix(name) in SUFFIXES:
            images.setdefault(stem, []).append(name)
    for stem, names in images.items():
        captions: list[object] = []
        if stem in texts:
            captions += _captions(listing, folder, texts[stem])
        for name in names:
            top = name.split(os.sep)[0].lower() if os.sep in name else ""
            listing.add(name, captions, texts.get(stem, name), split=SPLITS.get(top))
    for stem in texts.keys() - images.keys():
        listing.skipped.add("text", texts[stem], "there is no image of the same stem")
    return listing


def _captions(listing: Listing, folder: Path, name: str) -> list[str]:
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        listing.skipped.add("text", name, "it leads out of the folder")
        return []
    try:
        if not path.is_file() or path.stat().st_size > MOST_TEXT_BYTES:
            listing.skipped.add("text", name, f"it is no file of up to {MOST_TEXT_BYTES} bytes")
            return []
        text = read_text(path)
    except (OSError, ValueError) as error:
        listing.skipped.add("text", name, "it cannot be read", error)
        return []
    return [line for line in text.splitlines() if line.strip()] or [text]


def _files(folder: Path) -> list[str]:
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(at, name), folder)
            for name in files
            if not name.startswith(".")
        ]
    return sorted(found)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower().removeprefix(".")
