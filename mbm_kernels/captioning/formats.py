"""Captions as bytes in the formats of `caption generate`, piece by piece as they are made."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mbm_kernels.captioning import pages
from mbm_kernels.captioning.captioner import Caption
from mbm_kernels.captioning.sources import Source

PREVIEW = 256  # pixels of a gallery's images
DIMMED = 0.8  # how dark what a word does not attend to is shown
# What is in a name but is no text, as os.fsdecode has it, is an escape of JSON.
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}


@dataclass(frozen=True)
class Captioned:
    source: Source
    caption: Caption


@dataclass(frozen=True)
class Context:
    """What a format needs beside captions.

    alone: one image, named by the user. ids: of COCO, by name. facts: lines for a gallery's head.
    left: images that did not decode, filled while the captions are made.
    """

    alone: bool = False
    ids: dict[str, int] = field(default_factory=dict)
    facts: Sequence[str] = ()
    left: list[str] = field(default_factory=list)


def text(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    """A caption a line, after the image's name and a tab but for one that stands alone."""
    for one in found:
        name = b"" if context.alone else os.fsencode(one.source.name) + b"\t"
        yield name + one.caption.text.encode() + b"\n"


def json_array(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    yield from _array(map(_as_object, found))


def json_lines(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    for one in found:
        yield _json(_as_object(one)) + b"\n"


def coco(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    """COCO's results format, as COCO.loadRes takes it."""
    yield from _array(
        {"image_id": context.ids[one.source.name], "caption": one.caption.text} for one in found
    )


def comma_separated(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    """A header and a row for each image, quoted as RFC 4180 has it."""
    yield b"image,caption\r\n"
    for one in found:
        row = io.StringIO()
        csv.writer(row).writerow((one.source.name, one.caption.text))
        yield row.getvalue().encode("utf-8", "surrogateescape")


def html(found: Iterable[Captioned], context: Context) -> Iterator[bytes]:
    """A gallery in one file, each word over the part of the image that it attended to."""
    cards = map(_card, found)
    pieces = pages.stream("gallery.html", cards=cards, facts=context.facts, left=context.left)
    for piece in pieces:
        yield piece.encode("utf-8", "replace")


Format = Callable[[Iterable[Captioned], Context], Iterator[bytes]]
FORMATS: dict[str, Format] = {
    "text": text,
    "json": json_array,
    "jsonl": json_lines,
    "csv": comma_separated,
    "coco": coco,
    "html": html,
}
SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "jsonl", ".csv": "csv"} | dict.fromkeys(
    (".html", ".htm"), "html"
)


def named(name: str | None, output: Path | None) -> str:
    """The format asked for, else that of the output's suffix, else text.

    Raises:
        ValueError: there is no such format.
    """
    if name is None:
        return "text" if output is None else SUFFIXES.get(output.suffix.lower(), "text")
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    return name


def coco_ids(sources: Sequence[Source], annotations: Path | None) -> dict[str, int]:
    """The image ids of COCO's results, by the sources' names.

    Args:
        annotations: a COCO file, whose ids are taken by file name; None takes the number that a
            name ends in, as in COCO_val2014_000000000042.jpg.

    Raises:
        ValueError: a name without an id, or two with the same.
        FileNotFoundError: there are no such annotations.
    """
    known = None if annotations is None else _ids_of(annotations)
    ids: dict[str, int] = {}
    names: dict[int, str] = {}
    for source in sources:
        name = source.name
        if known is not None:
            found = known.get(Path(name).name)
        else:
            digits = re.search(r"[0-9]+$", source.stem)
            found = None if digits is None else int(digits[0])
        if found is None:
            where = "a number at its end" if known is None else f"one of {annotations}"
            raise ValueError(
                f"image {name}: got no id for COCO's results, expected {where}; give the images' "
                "annotations to --annotations, or take another --format"
            )
        if names.setdefault(found, name) != name:
            raise ValueError(
                f"image {name}: got the id {found} of {names[found]}, expected one of its own; "
                "give the images' annotations to --annotations, or take another --format"
            )
        ids[name] = found
    return ids


def _ids_of(annotations: Path) -> dict[str, int]:
    def foreign(reason: str) -> ValueError:
        return ValueError(
            f"annotations {annotations}: got {reason}, expected COCO's images with file_name and "
            "id; give captions_*.json"
        )

    if not annotations.is_file():
        raise FileNotFoundError(f"annotations {annotations}: got no such file, expected COCO's")
    try:
        content = json.loads(annotations.read_bytes())
    except (ValueError, RecursionError) as error:
        raise foreign(f"no JSON ({error})") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise foreign("no list of images")
    ids: dict[str, int] = {}
    for image in images:
        name, found = (
            (image.get("file_name"), image.get("id")) if isinstance(image, dict) else (None, None)
        )
        if not isinstance(name, str) or type(found) is not int:
            raise foreign(f"the image {str(image)[:80]}")
        ids[Path(name).name] = found
    return ids


def _as_object(one: Captioned) -> dict[str, str]:
    return {"image": one.source.name, "caption": one.caption.text}


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(**UTF8)


def _array(values: Iterable[object]) -> Iterator[bytes]:
    before = b"["
    for value in values:
        yield before + b"\n" + _json(value)
        before = b","
    yield (b"[]" if before == b"[" else b"\n]") + b"\n"


def _card(one: Captioned) -> dict[str, Any]:
    pixels = one.source.read(PREVIEW).permute(1, 2, 0).numpy()
    words = zip(one.caption.words, one.caption.weights, strict=True)
    return {
        "name": one.source.name,
        "caption": one.caption.text,
        "picture": pages.data_uri(Image.fromarray(pixels), "JPEG"),
        "words": [(word, pages.data_uri(_shade(row))) for word, row in words],
    }


def _shade(weights: Tensor) -> Image.Image:
    """Black over what a word, of weights [S], does not attend to; a browser scales it smoothly."""
    side = int(weights.numel() ** 0.5)
    level = weights.float().cpu().reshape(side, side)
    level = level / level.max().clamp_min(1e-30)
    alpha = ((1 - level) * (255 * DIMMED)).round().byte().numpy()
    black = Image.new("L", (side, side))
    return Image.merge("LA", (black, Image.fromarray(alpha)))
