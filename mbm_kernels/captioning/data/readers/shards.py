"""WebDataset shards: tar files of samples, an image and its text under one key each.

They are read by their members' places. Nothing is extracted, so that no member lands anywhere.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .listing import SUFFIXES, Listing, split_in
from .tables import CAPTION

TEXTS = ("txt", "caption", "text")
MOST_TEXT_BYTES = 1 << 20
MOST_IMAGE_BYTES = 1 << 28
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError)


@dataclass
class _Sample:
    """What a key has so far: the place of its image, its captions by suffix."""

    member: int | None = None
    captions: dict[str, list[object]] = field(default_factory=dict)


def read_shards(base: Path, paths: Sequence[Path]) -> Listing:
    """The samples of tar files; a file that is damaged gives those before the damage."""
    listing = Listing("WebDataset", base, splits_by_name=True)
    for path in paths:
        samples: dict[str, _Sample] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for place, member in enumerate(archive):
                    _take(listing, samples, archive, member, place, path.name)
                _check_end(archive)
        except DAMAGE as error:
            listing.skipped.add("shard", path.name, "it cannot be read to its end", error)
        for key, sample in samples.items():
            _add(listing, path, key, sample)
    return listing


def read_members(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Content of the members at some places, in the file's order.

    Raises:
        ValueError: the file changed or is damaged.
    """
    left = set(wanted)
    try:
        with tarfile.open(path, "r:") as archive:
            for place, member in enumerate(archive):
                if place in left:
                    left.remove(place)
                    yield place, _content(archive, member)
                if not left:
                    return
    except DAMAGE as error:
        raise ValueError(f"it cannot be read to its end ({error})") from error
    raise ValueError("it changed since it was scanned")


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a header that is cut or damaged for the end, which is a block of zeros."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {archive.offset}")


def _take(
    listing: Listing,
    samples: dict[str, _Sample],
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    place: int,
    shard: str,
) -> None:
    """Put a member into its sample."""
    where = f"{shard}: {member.name}"
    base = posixpath.basename(member.name)
    if member.isdir() or base.startswith("."):
        return
    if not member.isreg() or member.issparse():
        listing.skipped.add("member", where, "it is no plain file but a link or a device")
        return
    if member.name.startswith("/") or ".." in member.name.split("/"):
        listing.skipped.add("member", where, "its name is absolute or leads out")
        return
    stem, _, suffix = base.partition(".")
    kind = suffix.lower().rpartition(".")[2]
    is_image = kind in SUFFIXES
    if not is_image and kind not in (*TEXTS, "json"):
        return
    if member.size > (MOST_IMAGE_BYTES if is_image else MOST_TEXT_BYTES):
        listing.skipped.add("member", where, "it is too large", f"{member.size} bytes")
        return
    sample = samples.setdefault(posixpath.join(posixpath.dirname(member.name), stem), _Sample())
    if is_image:
        if sample.member is None:
            sample.member = place
        else:
            listing.skipped.add("member", where, "its sample has an image already")
    elif kind in sample.captions:
        listing.skipped.add("member", where, f"its sample has a {kind} already")
    else:
        content = _content(archive, member)
        sample.captions[kind] = _captions(listing, kind, content, where)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _captions(listing: Listing, kind: str, content: bytes, where: str) -> list[object]:
    text = content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    if kind != "json":
        return [line for line in text.splitlines() if line.strip()] or [text]
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        listing.skipped.add("member", where, "it is not JSON", error)
        return []
    for name in CAPTION:
        value = fields.get(name) if isinstance(fields, dict) else None
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def _add(listing: Listing, path: Path, key: str, sample: _Sample) -> None:
    name = f"{path.name}/{key}"
    if sample.member is None:
        listing.skipped.add("sample", name, "it has no image")
        return
    # A text beside a json says the same: what web crawls write.
    captions = next((sample.captions[k] for k in (*TEXTS, "json") if k in sample.captions), [])
    split = split_in(path.stem)
    listing.add(name, captions, path.name, split=split, shard=path, member=sample.member)
