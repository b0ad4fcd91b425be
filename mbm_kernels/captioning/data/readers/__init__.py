"""Captioned images of the user's own: what is given is looked at to choose a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .coco import read_coco_folder, read_json
from .flickr import LINE, read_token
from .folders import image_files, read_folder
from .listing import Entry, Listing, Skipped, read_text
from .parquet import read_images, read_parquet
from .shards import read_members, read_shards
from .tables import delimiter_of, read_delimited, read_json_lines

__all__ = ["Entry", "Listing", "Skipped", "contents", "image_files", "read"]

FORMATS = (
    "captions_*.json (COCO), dataset_*.json (Karpathy), captions.txt or *.token (Flickr), a CSV, "
    "TSV or JSON Lines file with a header, a folder of images with text files of the same stem, "
    "*.tar (WebDataset), *.parquet"
)
# What is looked for in a folder, by kind. Several files of one kind are read together where the
# second entry says so.
IN_FOLDER: dict[str, tuple[tuple[str, ...], bool]] = {
    "COCO": (("captions_*.json", "annotations/captions_*.json"), True),
    "Karpathy": (("dataset_*.json", "dataset.json"), False),
    "Flickr": (("*.token", "*.token.txt"), False),
    "table": (
        ("captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "captions.json",
         "metadata.csv", "metadata.jsonl"),
        False,
    ),
    "WebDataset": (("*.tar",), True),
    "parquet": (("*.parquet", "data/*.parquet"), True),
}  # fmt: skip
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
READERS: dict[str, Callable[[Path], Listing]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".tar": lambda path: read_shards(path.parent, [path]),
    ".parquet": lambda path: read_parquet(path.parent, [path]),
}


def read(path: Path) -> Listing:
    """The images of a file or a folder with their captions.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no reader fits, several do, or the file is damaged as a whole.
        ImportError: its reader needs a package that is missing.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"data {path}: got no such file or folder, expected {FORMATS}")
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise ValueError(
            f"data {path}: got a compressed file, expected {FORMATS}; decompress it first"
        )
    return READERS.get(suffix, _read_text)(path)


def contents(shard: Path, members: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The encoded images at some places of a tar or parquet file."""
    reader = read_images if shard.suffix.lower() == ".parquet" else read_members
    return reader(shard, members)


def _read_folder(folder: Path) -> Listing:
    found = {
        kind: files
        for kind, (patterns, _) in IN_FOLDER.items()
        if (files := sorted(file for p in patterns for file in folder.glob(p) if file.is_file()))
    }
    files = [file for kind in found for file in found[kind]]
    if len(found) > 1 or (files and len(files) > 1 and not IN_FOLDER[next(iter(found))][1]):
        names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise ValueError(
            f"data {folder}: got {names} in one folder, expected captions in one of them; give "
            "the path of the one that is meant"
        )
    if not files:
        if not image_files(folder):
            raise ValueError(
                f"data {folder}: got a folder with neither captions nor images, expected {FORMATS}"
            )
        return read_folder(folder)
    kind = next(iter(found))
    if kind == "WebDataset":
        return read_shards(folder, files)
    if kind == "parquet":
        return read_parquet(folder, files)
    listing = read_coco_folder(folder, files) if len(files) > 1 else read(files[0])
    listing.base = folder
    return listing


def _read_text(path: Path) -> Listing:
    """A text file, by its first line."""
    first = next((line for line in read_text(path).splitlines() if line.strip()), "")
    if LINE.fullmatch(first):
        return read_token(path)
    if delimiter_of(first) is not None:
        return read_delimited(path)
    shown = first.encode(errors="replace").decode()[:80]
    raise ValueError(f"data {path}: got {shown!r} for a first line, expected {FORMATS}")
