"""Parquet files as the `datasets` library writes them: an image column of bytes, a text column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .listing import Listing, split_in
from .tables import pick

BATCH = 64  # rows held at a time
DAMAGE = (OSError, ValueError)  # pyarrow's errors derive from these


def read_parquet(base: Path, paths: Sequence[Path]) -> Listing:
    """The rows of parquet files; one that is damaged gives those before the damage.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: the columns name no image and caption.
    """
    listing = Listing("parquet", base, splits_by_name=True)
    for path in paths:
        try:
            file = _open(path)
        except DAMAGE as error:
            listing.skipped.add("shard", path.name, "it cannot be read", error)
            continue
        names = {name.lower(): name for name in file.schema_arrow.names}
        _, caption, split = pick(list(names), path)
        listing.splits_by_name = listing.splits_by_name and split is None
        wanted = [names[column] for column in (caption, split) if column is not None]
        try:
            for place, row in _rows(file, wanted):
                captions = row[names[caption]]
                listing.add(
                    f"{path.name}/{place}",
                    captions if isinstance(captions, list) else [captions],
                    f"{path.name} row {place}",
                    split=row[names[split]] if split else split_in(path.stem),
                    shard=path,
                    member=place,
                )
        except DAMAGE as error:
            listing.skipped.add("shard", path.name, "it cannot be read to its end", error)
    return listing


def read_images(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The encoded images of some rows, in the file's order; b"" where a row has none.

    Raises:
        ValueError: the file changed or is damaged.
    """
    left = set(wanted)
    try:
        file = _open(path)
        names = {name.lower(): name for name in file.schema_arrow.names}
        image = pick(list(names), path)[0]
        for place, row in _rows(file, [names[image]]):
            if place in left:
                left.remove(place)
                value = row[names[image]]
                content = value.get("bytes") if isinstance(value, dict) else value
                yield place, content if isinstance(content, bytes) else b""
    except DAMAGE as error:
        raise ValueError(f"it cannot be read to its end ({error})") from error
    if left:
        raise ValueError("it changed since it was scanned")


def _rows(file: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    place = 0
    for batch in file.iter_batches(batch_size=BATCH, columns=list(columns)):
        for row in batch.to_pylist():
            yield place, row
            place += 1


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"data {path}: got a parquet file but no pyarrow, expected the package to read it; "
            "pip install pyarrow, or give another format"
        ) from error
    return pyarrow.parquet.ParquetFile(path)
