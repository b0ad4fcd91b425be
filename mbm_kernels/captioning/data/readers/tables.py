"""Tables with a header: CSV, TSV, JSON Lines, and a JSON list of objects."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .listing import Listing, read_text

# The first of each is taken where it is there; else there must be exactly one of the others.
IMAGE = (
    "image", "file_name", "filename", "image_name", "image_path", "image_file", "path", "filepath",
    "file_path", "file", "img", "img_path",
)  # fmt: skip
CAPTION = (
    "caption", "captions", "text", "texts", "sentence", "sentences", "description", "comment",
)  # fmt: skip
SPLIT = ("split",)
DELIMITERS = (",", "\t", ";", "|")
MOST_LINES = 50  # of one quoted field; a quote that is open for longer is a mistake of its line
HEADER_ROWS = 100  # JSON objects whose keys are taken for columns


def read_delimited(path: Path) -> Listing:
    """A CSV or TSV file with a header that names an image and a caption column.

    Raises:
        ValueError: no such header, or one with several columns for the same.
    """
    listing = Listing("table", path.parent)
    lines = list(io.StringIO(read_text(path), newline=""))
    first = next((line for line in lines if line.strip()), "")
    delimiter = delimiter_of(first)
    if delimiter is None:
        got = repr(first.strip()[:80]) if first else "an empty file"
        raise ValueError(
            f"data {path}: got {got} for a header, expected one with a column for the image "
            f"({', '.join(IMAGE[:3])}, ...) and one for the caption ({', '.join(CAPTION[:3])}, "
            "...); add a first line such as image,caption"
        )
    header: list[str] = []
    columns: tuple[str, str, str | None] = ("", "", None)
    for number, row in _records(lines, delimiter, listing, path):
        if not header:
            header = [_folded(name) for name in row]
            columns = pick(header, path)
            continue
        if len(row) != len(header):
            listing.skipped.add(
                "line",
                f"{path.name} line {number}",
                f"it has not the header's {len(header)} fields",
                f"{len(row)}; quote a caption that holds a {delimiter!r}",
            )
            continue
        _add(listing, dict(zip(header, row, strict=True)), columns, f"{path.name} line {number}")
    return listing


def delimiter_of(line: str) -> str | None:
    """What separates the columns of a header that names an image and a caption."""
    for delimiter in DELIMITERS:
        names = {_folded(name.strip('"')) for name in line.split(delimiter)}
        if names & {*IMAGE} and names & {*CAPTION}:
            return delimiter
    return None


def _records(
    lines: Sequence[str], delimiter: str, listing: Listing, path: Path
) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line; a line that is no row is skipped alone."""
    place = 0
    while place < len(lines):
        reader = csv.reader(lines[place : place + MOST_LINES], delimiter=delimiter, strict=True)
        try:
            row = next(reader)
        except csv.Error as error:
            place += 1
            if delimiter == "\t":  # many write tabs without quoting: a quote is a quote then
                yield place, lines[place - 1].rstrip("\r\n").split("\t")
            else:
                what = f"{path.name} line {place}"
                listing.skipped.add("line", what, "its quotes do not match", error)
            continue
        if row and any(field.strip() for field in row):
            yield place + 1, row
        place += reader.line_num


def read_json_lines(path: Path) -> Listing:
    """A file with a JSON object in each line.

    Raises:
        ValueError: no line is an object, or its keys name no image and caption.
    """
    listing = Listing("JSON Lines", path.parent)
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(io.StringIO(read_text(path), newline=""), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            listing.skipped.add("line", where, "it is not JSON", error)
            continue
        if isinstance(row, dict):
            rows.append((where, row))
        else:
            listing.skipped.add("line", where, "it is no JSON object")
    _add_objects(listing, rows, path)
    return listing


def read_objects(path: Path, rows: Iterable[object]) -> Listing:
    """A JSON list of objects.

    Raises:
        ValueError: as `read_json_lines`.
    """
    listing = Listing("JSON list", path.parent)
    found: list[tuple[str, dict[str, Any]]] = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            found.append((f"{path.name} item {number}", row))
        else:
            listing.skipped.add("line", f"{path.name} item {number}", "it is no JSON object")
    _add_objects(listing, found, path)
    return listing


def _add_objects(listing: Listing, rows: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    if not rows:
        raise ValueError(
            f"data {path}: got no JSON object, expected some with the keys image and caption; "
            "is it another format with this suffix?"
        )
    header = list(dict.fromkeys(_folded(key) for _, row in rows[:HEADER_ROWS] for key in row))
    columns = pick(header, path)
    for where, row in rows:
        folded = {_folded(key): value for key, value in row.items()}
        missing = [name for name in columns[:2] if name not in folded]
        if missing:
            listing.skipped.add("line", where, f"it has no {missing[0]}")
        else:
            _add(listing, folded, columns, where)


def pick(header: Sequence[str], path: Path) -> tuple[str, str, str | None]:
    """The columns of image, caption and split.

    Raises:
        ValueError: one of the first two is missing, or there are several for the same.
    """
    image = _one(header, IMAGE, path)
    caption = _one(header, CAPTION, path)
    if image is None or caption is None:
        raise ValueError(
            f"data {path}: got the columns {', '.join(header)}, expected one for the "
            f"{'image' if image is None else 'caption'} "
            f"({', '.join(IMAGE if image is None else CAPTION)}); rename it in the header"
        )
    return image, caption, _one(header, SPLIT, path)


def _one(header: Sequence[str], names: tuple[str, ...], path: Path) -> str | None:
    found = [name for name in header if name in names]
    plain = [name for name in found if name == names[0]]
    if len(plain) == 1 or len(found) == 1:
        return (plain or found)[0]
    if found:
        raise ValueError(
            f"data {path}: got the columns {', '.join(found)}, expected one for the {names[0]}; "
            f"rename the one that is meant to {names[0]} and the others to something else"
        )
    return None


def _add(
    listing: Listing, row: dict[str, Any], columns: tuple[str, str, str | None], where: str
) -> None:
    image, caption, split = columns
    captions = row[caption] if isinstance(row[caption], list) else [row[caption]]
    listing.add(row[image], captions, where, split=row.get(split) if split else None)


def _folded(name: object) -> str:
    return str(name).strip().lower()
