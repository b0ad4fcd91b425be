"""What `caption generate` is given to caption: files, folders, and what standard input holds."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch import Tensor

from mbm_kernels.captioning.data.readers import image_files
from mbm_kernels.captioning.pictures import DAMAGE, decode_picture, read_picture

BATCH = 64  # images captioned at a time
STDIN = "-"
MOST_STDIN = 1 << 28  # bytes: an image, or millions of paths


@dataclass(frozen=True)
class Source:
    """An image: a file, or its bytes under a name.

    asked: the user named it, so that it must decode.
    """

    name: str
    asked: bool = True
    content: bytes | None = None

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    def read(self, side: int) -> Tensor:
        """uint8 [3, side, side]; raises as `read_picture`."""
        if self.content is None:
            return read_picture(self.name, side)
        return decode_picture(io.BytesIO(self.content), self.name, side)


def listed(arguments: Sequence[str], stdin: BinaryIO) -> list[Source]:
    """Files as they are named, the image files below folders, and for `-` what stdin holds.

    Raises:
        ValueError: a folder without images, or standard input that is neither an image nor paths.
    """
    if list(arguments).count(STDIN) > 1:
        raise ValueError("images: got - twice, expected it once; standard input is read once")
    found: list[Source] = []
    for argument in arguments:
        if argument == STDIN:
            found += _of_stdin(stdin)
        elif Path(argument).is_dir():
            found += _below(Path(argument))
        else:
            found.append(Source(argument))
    return found


def _below(folder: Path) -> list[Source]:
    names = image_files(folder)
    if not names:
        raise ValueError(f"images: got {folder}, a folder without images, expected some")
    return [Source(str(folder / name), asked=False) for name in names]


def _of_stdin(stdin: BinaryIO) -> list[Source]:
    """An image if Pillow knows its format, else paths, one a line."""
    content = stdin.read(MOST_STDIN + 1)
    if len(content) > MOST_STDIN:
        raise ValueError(
            f"standard input: got more than {MOST_STDIN} bytes, expected an image or paths, one a "
            "line; give the folder instead"
        )
    if _is_image(content):
        return [Source(STDIN, content=content)]
    lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    paths = [line for line in lines if line.strip()]
    if not paths or b"\0" in content:
        got = "nothing" if not content.strip() else f"{len(content)} bytes of neither"
        raise ValueError(
            f"standard input: got {got}, expected an image or paths, one a line; look at what "
            "writes to it"
        )
    # Bytes of a name that are no text stay as they are.
    return [Source(os.fsdecode(path), asked=False) for path in paths]


def _is_image(content: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(content)).close()
    except DAMAGE:
        return False
    return True


def read_batches(
    sources: Iterable[Source], image_size: int, left: Callable[[str], object]
) -> Iterator[list[tuple[Source, Tensor]]]:
    """The images uint8 [3, Y, X] by the batch.

    Args:
        left: called with a line on each image that was not asked for by name and does not decode.

    Raises:
        FileNotFoundError, ValueError: one that was asked for is absent or does not decode, before
            the first batch.
    """
    sources = list(sources)
    asked = {source: source.read(image_size) for source in sources if source.asked}
    batch: list[tuple[Source, Tensor]] = []
    for source in sources:
        try:
            pixels = asked[source] if source.asked else source.read(image_size)
        except (ValueError, OSError) as error:
            left(" ".join(str(error).split()))
            continue
        batch.append((source, pixels))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
