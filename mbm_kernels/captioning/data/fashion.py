"""Fashion-MNIST: 70,000 grey photographs of 28 x 28 pixels, a word for each of ten classes.

From the Debian package dataset-fashion-mnist, fetched by name at the user's request (MIT,
copyright 2017 Zalando SE). Exact match of a caption is the accuracy that others report: of two
convolutions, 91.6 to 93.4 % on `test`.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from .debian import DebianSet, Files, Samples

CLASSES = (
    "top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
COUNTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
SIDE = 28
MAGIC = {1: 2049, 3: 2051}  # of labels [N] and images [N, 28, 28]


def _shards(files: Files) -> dict[str, Samples]:
    held = dict(files)
    return {
        split: _samples(
            _array(held, f"{prefix}-images-idx3-ubyte.gz", (count, SIDE, SIDE)),
            _array(held, f"{prefix}-labels-idx1-ubyte.gz", (count,)),
        )
        for split, (prefix, count) in COUNTS.items()
    }


def _samples(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for place, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", compress_level=1)
        yield f"{place:05d}", {"png": out.getvalue(), "txt": CLASSES[label].encode()}


def _array(held: dict[str, bytes], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """An IDX file: magic and sizes as big-endian 32-bit integers, then bytes.

    Raises:
        ValueError: it is missing, damaged or of another shape.
    """
    header = np.array([MAGIC[len(shape)], *shape], ">u4").tobytes()
    try:
        content = gzip.decompress(held.get(name, b""))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"fashion: got a damaged {name} ({error}), expected an IDX file; fetch it again"
        ) from error
    if not content.startswith(header) or len(content) != len(header) + int(np.prod(shape)):
        raise ValueError(
            f"fashion: got {name} of {len(content)} bytes, expected an IDX file of {list(shape)}; "
            "fetch the package again"
        )
    values = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1 and values.max() >= len(CLASSES):
        raise ValueError(f"fashion: got the label {values.max()} in {name}, expected 0 to 9")
    return values


FASHION = DebianSet(
    "fashion", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", (".gz",), _shards
)
