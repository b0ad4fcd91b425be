"""Captioned images of the user's own: scanned, decoded once, split by image, and loaded.

A prepared folder belongs to one source. It holds manifest.json, skipped.jsonl (all that was left
out, one object a line) and `images-<size>/<split>.npy`. The manifest is written last, so that a
folder without one is prepared anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from mbm_kernels._core import env
from mbm_kernels._core.files import write_atomic
from mbm_kernels.captioning.lock import PARTIAL, locked
from mbm_kernels.captioning.progress import training_progress

from . import manifest as manifests
from .base import CaptionSet
from .decoding import decode
from .locate import locate
from .manifest import MANIFEST, SKIPPED, Manifest, checksum_of, pixel_folder, write_pixels
from .readers import Entry, Listing, Skipped, read
from .readers.listing import MOST_SPLITS
from .splitting import assign

SIDES = (16, 4096)
STRIDE = 8  # what the model's poolings need the side to be a multiple of

Say = Callable[[str], None]
Splits = dict[str, tuple[list[str], list[list[str]]]]  # ids and the captions of each


@dataclass(frozen=True)
class _Decoder:
    """How images are decoded; `title` of the progress, None for none."""

    image_size: int
    workers: int | None
    title: str | None

    def decode(self, entries: Sequence[Entry], raw: BinaryIO, skipped: Skipped) -> dict[int, str]:
        progress = training_progress(self.title, len(entries), 0, unit="image", stderr=True)
        with progress as report:
            return decode(
                entries,
                self.image_size,
                raw,
                skipped,
                workers=self.workers,
                report=lambda count: report(count, {}),
            )


def prepare(
    source: str | Path,
    images: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    image_size: int = 64,
    seed: int | None = None,
    workers: int | None = None,
    progress: Say | None = None,
) -> Path:
    """Scan captions and images and write a prepared folder, or return it if it is up to date.

    Args:
        source: a file or folder that `readers.read` knows, or a prepared folder.
        images: what image names are relative to; None takes the folder that holds the captions.
        folder: None takes one in the cache that belongs to `source` and `images`.
        image_size: side of the decoded images.
        seed: of the drawn splits; None keeps those of a manifest that is there, else takes 0.
        workers: threads that decode; None takes as many as there are cores, 16 at most.
        progress: called with lines of text.

    Raises:
        FileNotFoundError: there is no source.
        ValueError: an impossible size, no reader fits, or nothing is left to train on.
        RuntimeError: another process prepares the same folder.
        OSError: the folder cannot be written.
    """
    _check_numbers(image_size, seed, workers)
    say = progress or (lambda _: None)
    source, images = Path(source), Path(images) if images is not None else None
    if manifests.is_prepared(source):
        held = manifests.read(source)
        if folder is None:
            folder = source
        source = Path(held.source)
        images = images or (Path(held.images) if held.images is not None else None)
    target = Path(folder) if folder is not None else default_folder(source, images)
    listing = read(source)
    entries = locate(listing, images)
    checksum = checksum_of(entries)
    known = _known(target, checksum, seed)
    decoder = _Decoder(image_size, workers, None if progress is None else "decoding")
    if known is None or not pixel_folder(target, image_size).is_dir():
        with locked(target, "data"):
            _refuse_foreign(target)
            known = _known(target, checksum, seed)  # another process may have made it meanwhile
            if known is None:
                seed = _seed_of(target) if seed is None else seed
                splits, content = _prepare_anew(target, source, listing, entries, seed, decoder)
                known = Manifest(
                    source=os.path.abspath(source),
                    images=os.path.abspath(images) if images is not None else None,
                    format=listing.format,
                    seed=seed,
                    checksum=checksum,
                    content=content,
                    skipped=len(listing.skipped.rows),
                    splits=splits,
                )
                os.sync()  # the manifest must not outlive a crash that the pixels do not
                known.write(target)
            elif not pixel_folder(target, image_size).is_dir():
                _add_size(target, known, entries, decoder)
    for line in (f"data: {known.format}, {source}", *known.lines(), *listing.skipped.lines()):
        say(line)
    if known.skipped:
        say(f"{known.skipped} skipped in all, listed in {target / SKIPPED}")
    say(f"manifest: {target / MANIFEST}")
    return target


def load(
    source: str | Path,
    images: str | Path | None = None,
    *,
    image_size: int = 64,
    limit: int | None = None,
    progress: Say | None = None,
) -> dict[str, CaptionSet]:
    """The splits of a source, prepared if need be; see `prepare`.

    A prepared folder that holds images of this size is taken as it is.
    """
    folder = Path(source)
    if not (manifests.is_prepared(folder) and pixel_folder(folder, image_size).is_dir()):
        folder = prepare(source, images, image_size=image_size, progress=progress)
    held = manifests.read(folder)
    return {
        split: manifests.open_split(folder, held, split, image_size, limit) for split in held.splits
    }


def default_folder(source: Path, images: Path | None) -> Path:
    """The folder in the cache that belongs to a source and its images."""
    real = [os.path.realpath(path) if path is not None else "" for path in (source, images)]
    mark = hashlib.sha256("\0".join(real).encode(errors="surrogateescape")).hexdigest()[:12]
    stem = "".join(c if c.isalnum() or c in "_-" else "-" for c in Path(real[0]).stem)[:40]
    return env.cache_dir() / "data" / f"{stem}-{mark}"


def _check_numbers(image_size: int, seed: int | None, workers: int | None) -> None:
    if not SIDES[0] <= image_size <= SIDES[1] or image_size % STRIDE:
        raise ValueError(
            f"image_size: got {image_size}, expected a multiple of {STRIDE} from {SIDES[0]} to "
            f"{SIDES[1]}"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"seed: got {seed}, expected 0 or more")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected at least 1")


def _known(folder: Path, checksum: str, seed: int | None) -> Manifest | None:
    """The folder's manifest if it is of these files and this seed."""
    if not manifests.is_prepared(folder):
        return None
    try:
        held = manifests.read(folder)
    except ValueError:
        return None
    fits = held.checksum == checksum and seed in (None, held.seed)
    return held if fits else None


def _refuse_foreign(folder: Path) -> None:
    """A folder of other things is never written into."""
    names = {path.name for path in folder.iterdir()} - {".lock", MANIFEST, SKIPPED}
    strange = sorted(name for name in names if not name.startswith("images-"))
    if strange or ((folder / MANIFEST).exists() and not manifests.is_prepared(folder)):
        raise ValueError(
            f"data {folder}: got a folder that holds {', '.join(strange[:4]) or MANIFEST}, "
            "expected an empty one or a prepared one; give another by --out"
        )


def _prepare_anew(
    folder: Path,
    source: Path,
    listing: Listing,
    entries: Sequence[Entry],
    seed: int,
    decoder: _Decoder,
) -> tuple[Splits, str]:
    """Decode all, split, and write everything but the manifest; also a checksum of the content."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for old in folder.glob("images-*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as scratch:
        partial = Path(scratch)
        with (partial / "raw").open("wb+") as raw:
            done = decoder.decode(entries, raw, listing.skipped)
            if not done:
                raise _nothing_left(source, listing.skipped)
            kept = [entries[place] for place in done]
            chosen = assign([entry.split for entry in kept], list(done.values()), seed)
            _check_splits(source, chosen)
            pixels = partial / "images"
            pixels.mkdir()
            places = list(done)
            for split, rows in chosen.items():
                in_file = [places[row] for row in rows]
                write_pixels(raw, in_file, decoder.image_size, pixels / f"{split}.npy")
        pixels.rename(pixel_folder(folder, decoder.image_size))
    rows_of = listing.skipped.rows
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows_of]
    write_atomic(folder / SKIPPED, "".join(lines).encode())
    content = hashlib.sha256(json.dumps([chosen, list(done.values())]).encode())
    splits: Splits = {}
    for split, rows in chosen.items():
        splits[split] = [kept[row].name for row in rows], [kept[row].captions for row in rows]
    content.update(json.dumps(splits).encode())
    return splits, content.hexdigest()


def _add_size(folder: Path, known: Manifest, entries: Sequence[Entry], decoder: _Decoder) -> None:
    """Decode the manifest's images at another size."""
    by_name = {entry.name: entry for entry in entries}
    wanted = [by_name[name] for ids, _ in known.splits.values() for name in ids]
    order = {entry.name: place for place, entry in enumerate(wanted)}
    skipped = Skipped()
    with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as scratch:
        pixels = Path(scratch) / "images"
        pixels.mkdir()
        with (Path(scratch) / "raw").open("wb+") as raw:
            decoder.decode(wanted, raw, skipped)
            if skipped.rows:
                raise ValueError(
                    f"data {folder}: got {len(skipped.rows)} images that decoded before and do "
                    f"not now ({skipped.rows[0].what}: {skipped.rows[0].detail}), expected the "
                    f"same files; delete the folder and {manifests.REMEDY}"
                )
            for split, (ids, _) in known.splits.items():
                places = [order[name] for name in ids]
                write_pixels(raw, places, decoder.image_size, pixels / f"{split}.npy")
        os.sync()
        pixels.rename(pixel_folder(folder, decoder.image_size))


def _seed_of(folder: Path) -> int:
    try:
        return manifests.read(folder).seed if manifests.is_prepared(folder) else 0
    except ValueError:
        return 0


def _check_splits(source: Path, chosen: dict[str, list[int]]) -> None:
    if len(chosen) > MOST_SPLITS:
        raise ValueError(
            f"data {source}: got {len(chosen)} splits ({', '.join(list(chosen)[:4])}, ...), "
            f"expected at most {MOST_SPLITS}; rename the column if it is no split"
        )


def _nothing_left(source: Path, skipped: Skipped) -> ValueError:
    why = "; ".join(skipped.lines(1)[:3]) or "it is empty"
    return ValueError(
        f"data {source}: got no image with a caption ({why}), expected one at least; look at the "
        "file and at --images"
    )
