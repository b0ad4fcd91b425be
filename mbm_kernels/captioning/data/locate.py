"""The files that image names stand for, never outside the images folder."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from .readers import Entry, Listing

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def locate(listing: Listing, images: Path | None) -> list[Entry]:
    """The entries that have captions and a file, with its path, bytes and time of change.

    Entries of one file become one. What is left out is added to `listing.skipped`.

    Args:
        images: the folder that names are relative to; None takes the listing's own.

    Raises:
        ValueError: there is no such folder, or none of the images is in it.
    """
    root = images if images is not None else listing.base
    if not root.is_dir():
        raise ValueError(
            f"images: got {root}, expected a folder; give the one that holds the files"
        )
    real = os.path.realpath(root)
    told_splits = {entry.split for entry in listing.entries.values()} - {None}
    if listing.splits_by_name and len(told_splits) < 2:
        for entry in listing.entries.values():
            entry.split = None
    found: dict[str, Entry] = {}
    folders: dict[str, str] = {}
    told: list[tuple[str, str]] = []
    for entry in listing.entries.values():
        if not entry.captions:
            listing.skipped.add("image", entry.name, "it has no caption")
            continue
        if entry.shard is not None:
            facts = entry.shard.stat()
            entry.file, entry.stamp = entry.shard, (facts.st_size, facts.st_mtime_ns)
            found[entry.name] = entry
            continue
        why = _put(entry, real, folders)
        if why is not None:
            listing.skipped.add("image", entry.name, why)
            told.append((entry.name, why))
            continue
        name = str(entry.file)[len(os.path.join(real, "")) :]
        if name in found:
            _join(found[name], entry, listing)
        else:
            entry.name = name
            found[name] = entry
    if told and not found:
        name, why = told[0]
        raise ValueError(
            f"images {root}: got none of {len(told)} images ({name}: {why}), expected the folder "
            "that the names are relative to; give it by --images"
        )
    return list(found.values())


def _real(path: str, folders: dict[str, str]) -> str:
    """The real path; that of its folder is looked up once."""
    head, tail = os.path.split(path)
    if tail in ("", ".", ".."):
        return os.path.realpath(path)
    if head not in folders:
        folders[head] = os.path.realpath(head)
    path = os.path.join(folders[head], tail)
    return os.path.realpath(path) if os.path.islink(path) else path


def _put(entry: Entry, root: str, folders: dict[str, str]) -> str | None:
    """Find the entry's file below a real path; returns why there is none."""
    why = "there is no such file"
    names = [name.strip() for name in entry.names]
    names += [name.replace("\\", "/") for name in names if "\\" in name]
    for name in names:
        if _URL.match(name):
            return "its name is an address; download the images first"
        try:
            path = _real(os.path.join(root, name), folders)
            if not path.startswith(os.path.join(root, "")):
                why = "its name leads out of the images folder"
                continue
            facts = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            why = f"its file cannot be opened ({getattr(error, 'strerror', None) or error})"
            continue
        if not stat.S_ISREG(facts.st_mode):
            why = "it is no plain file"
        elif facts.st_size == 0:
            why = "its file is empty"
        else:
            entry.file, entry.stamp = Path(path), (facts.st_size, facts.st_mtime_ns)
            return None
    return why


def _join(first: Entry, other: Entry, listing: Listing) -> None:
    first.captions += other.captions
    if other.split not in (None, first.split):
        if first.split is None:
            first.split = other.split
        else:
            detail = f"{first.split} is kept, not {other.split}"
            listing.skipped.add("split", first.name, "the image is in two splits", detail)
