"""What `prepare` writes: manifest.json beside a folder of pixels for each image size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mbm_kernels._core.files import write_atomic

from .base import CaptionSet
from .readers import Entry

FORMAT = "mbm_kernels.captions"
VERSION = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
CHUNK = 1024  # images copied at a time
REMEDY = "prepare it again by `mbm-kernels caption prepare`"


@dataclass(frozen=True)
class Manifest:
    """Images and captions by split.

    source, images: what was given. checksum: of names, captions, sizes and times of change, which
    tells that nothing has to be read again. content: checksum of what was read, wherever it lies.
    splits: for each the ids of its images and the captions of each.
    """

    source: str
    images: str | None
    format: str
    seed: int
    checksum: str
    content: str
    skipped: int
    splits: dict[str, tuple[list[str], list[list[str]]]]

    def write(self, folder: Path) -> None:
        """Write manifest.json, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "images": self.images,
            "reader": self.format,
            "seed": self.seed,
            "checksum": self.checksum,
            "content": self.content,
            "skipped": self.skipped,
            "splits": {
                split: {"ids": ids, "captions": captions}
                for split, (ids, captions) in self.splits.items()
            },
        }
        # ASCII, which holds the bytes of a path that are not UTF-8.
        write_atomic(folder / MANIFEST, json.dumps(content, indent=0).encode())

    def lines(self) -> list[str]:
        """Its counts in words."""
        out = []
        for split, (ids, captions) in self.splits.items():
            out.append(f"{split}: {len(ids)} images, {sum(map(len, captions))} captions")
        return out


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a manifest of this package."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(256)


def read(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        ValueError: it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        manifest = _checked(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"data {path}: got a damaged manifest ({error!r}), expected what prepare wrote; "
            f"delete it and {REMEDY}"
        ) from error
    return manifest


def _checked(found: dict[str, Any]) -> Manifest:
    if (found["format"], found["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {found['format']} version {found['version']}")
    splits: dict[str, tuple[list[str], list[list[str]]]] = {}
    for split, content in found["splits"].items():
        ids, captions = content["ids"], content["captions"]
        whole = (
            _are_texts(ids)
            and len(ids) == len(captions) > 0
            and all(_are_texts(given) and given for given in captions)
        )
        if not whole or "/" in split or split.startswith("."):
            raise ValueError(f"split {split}")
        splits[split] = (ids, captions)
    names = ("source", "reader", "checksum", "content")
    texts = [*(found[name] for name in names), found["images"] or ""]
    if not splits or not _are_texts(texts) or type(found["seed"]) is not int:
        raise ValueError("a value of another type")
    return Manifest(
        found["source"],
        found["images"],
        found["reader"],
        found["seed"],
        found["checksum"],
        found["content"],
        int(found["skipped"]),
        splits,
    )


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def checksum_of(entries: Sequence[Entry]) -> str:
    """Of what the entries are and of their files' sizes and times of change."""
    total = hashlib.sha256()
    for entry in entries:
        row = [entry.name, entry.captions, entry.split, entry.member, *entry.stamp]
        total.update(json.dumps(row).encode())
    return total.hexdigest()


def pixel_folder(folder: Path, image_size: int) -> Path:
    return folder / f"images-{image_size}"


def write_pixels(raw: BinaryIO, places: Sequence[int], image_size: int, path: Path) -> None:
    """A .npy file uint8 [N, 3, Y, X] of the images at some places of a file of pixels.

    Raises:
        OSError: it cannot be written.
    """
    record = 3 * image_size * image_size
    shape = (len(places), 3, image_size, image_size)
    with path.open("wb") as file:
        # Written, not mapped: on a full disk a mapping kills the process.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for place in places:
            raw.seek(place * record)
            file.write(raw.read(record))


def open_split(
    folder: Path, manifest: Manifest, split: str, image_size: int, limit: int | None
) -> CaptionSet:
    """A split whose images stay on disk until they are used.

    Raises:
        ValueError: its pixels are missing or damaged.
    """
    ids, captions = manifest.splits[split]
    path = pixel_folder(folder, image_size) / f"{split}.npy"
    try:
        # Copy on write: torch wants memory that it may write to, the file is never changed.
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"data {path}: got pixels that cannot be read ({error}), expected what prepare wrote; "
            f"delete {folder} and {REMEDY}"
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(ids), 3, image_size, image_size):
        raise ValueError(
            f"data {path}: got {pixels.dtype} {list(pixels.shape)}, expected {len(ids)} images of "
            f"{image_size} pixels; delete {folder} and {REMEDY}"
        )
    count = min(len(ids), len(ids) if limit is None else limit)
    lengths = torch.tensor([len(given) for given in captions[:count]])
    several = bool((lengths > 1).any())
    return CaptionSet(
        images=torch.from_numpy(pixels[:count]),
        captions=[caption for given in captions[:count] for caption in given],
        ids=ids[:count],
        image_of=torch.arange(count).repeat_interleave(lengths) if several else None,
        checksum=manifest.content,
    )
