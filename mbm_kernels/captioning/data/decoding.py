"""Images decoded once, by several threads, into a file of 8-bit RGB.

Threads, because Pillow decodes and scales without the interpreter's lock: nothing is forked or
pickled, and no worker is left when this returns, so that the process may fork afterwards.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from mbm_kernels.captioning.pictures import decode_picture

from .readers import Entry, Skipped, contents

MOST_WORKERS = 16
AHEAD = 4  # images in work for each worker: what is held of a shard is bounded by it

Source = Path | bytes
Decoded = tuple[str, bytes]  # checksum of the encoded image, pixels [3, Y, X]


def default_workers() -> int:
    """The cores that this process may use, 16 at most."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def decode(
    entries: Sequence[Entry],
    image_size: int,
    file: BinaryIO,
    skipped: Skipped,
    *,
    workers: int | None = None,
    report: Callable[[int], None] | None = None,
) -> dict[int, str]:
    """Write the pixels of entry k at place k of a file.

    Args:
        file: open for writing; each image takes 3 image_size^2 bytes.
        skipped: takes what does not decode.
        report: called with the number of images done.

    Returns:
        Place to checksum of the encoded image, for those that decode.

    Raises:
        OSError: the file cannot be written.
    """
    done: dict[int, str] = {}
    record = 3 * image_size * image_size
    waiting: deque[tuple[int, Future[Decoded]]] = deque()

    def finish() -> None:
        place, future = waiting.popleft()
        try:
            checksum, pixels = future.result()
        except Exception as error:  # decoders raise anything on files that are damaged
            skipped.add("image", entries[place].name, "it does not decode", _reason(error))
        else:
            file.seek(place * record)
            file.write(pixels)
            done[place] = checksum

    count = workers or default_workers()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as pool:
        for number, (place, source) in enumerate(_sources(entries, skipped), 1):
            waiting.append((place, pool.submit(_decode, source, entries[place].name, image_size)))
            if len(waiting) >= AHEAD * count:
                finish()
            if report is not None:
                report(number)
        while waiting:
            finish()
    return done


def _sources(entries: Sequence[Entry], skipped: Skipped) -> Iterator[tuple[int, Source]]:
    """Place and path, or place and content of what lies in a shard."""
    for shard, group in groupby(range(len(entries)), lambda place: entries[place].shard):
        places = list(group)
        if shard is None:
            for place in places:
                file = entries[place].file
                assert file is not None  # it is located
                yield place, file
            continue
        by_member = {entries[place].member: place for place in places}
        try:
            for member, content in contents(shard, list(by_member)):
                yield by_member.pop(member), content
        except ValueError as error:
            for place in by_member.values():
                skipped.add("image", entries[place].name, "its shard is damaged", error)


def _decode(source: Source, name: str, image_size: int) -> Decoded:
    if isinstance(source, bytes):
        checksum = hashlib.sha256(source).hexdigest()
        picture = decode_picture(io.BytesIO(source), name, image_size)
    else:
        with source.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            picture = decode_picture(file, name, image_size)
    return checksum, picture.numpy().tobytes()


def _reason(error: Exception) -> str:
    """What of an error's "got ..., expected ..." says what was got."""
    text = str(error)
    _, _, got = text.partition(": got ")
    return (got or text).split(", expected")[0]
