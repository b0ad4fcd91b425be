"""Image files as 8-bit RGB: every mode that Pillow reads, upright, in bounded memory."""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 1 << 26  # 8192 x 8192; three copies of 4 bytes a pixel are 0.8 GB
CHUNK = 1 << 20  # values scaled at a time, in float64
# Lanczos takes time and a table by the ratio of the sides; a mean over blocks of pixels goes first
# where the ratio exceeds twice this.
REDUCING_GAP = 3.0
# EXIF orientation to what turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on files that are damaged.
DAMAGE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError,
    IndexError, TypeError, OverflowError, Image.DecompressionBombError,
)  # fmt: skip


def read_picture(path: str | Path, image_size: int) -> Tensor:
    """An image file as uint8 [3, image_size, image_size]: resized, then padded with white.

    Upright as its EXIF orientation says; the first frame of an animation; transparency on white.
    Greys of more than 8 bits are scaled from a range, never clipped: 16-bit ones from 0..65535;
    32-bit integers from 0..65535 if they lie in it, floats from 0..1, or else 0..255, if they lie
    in it; any others from their least value to their largest. NaN is black.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, a damaged one, or one of more than MAX_PIXELS.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"picture {path}: got no such file, expected a PNG or JPEG file")
    return decode_picture(path, path, image_size)


def decode_picture(file: Path | BinaryIO, path: str | Path, image_size: int) -> Tensor:
    """As `read_picture`, from an open file too; `path` names it in errors. Threads may share it."""
    with _decoding(path):
        opened = Image.open(file)
    with opened:
        return _pixels(opened, path, image_size)


def pixels_of(image: str | Path | Image.Image | Tensor, name: str, image_size: int) -> Tensor:
    """As `read_picture`, also from what is in memory; `name` stands for that in errors.

    A tensor is [3, Y, X], RGB: uint8, or floats from 0 to 1.

    Raises:
        FileNotFoundError, ValueError: as `read_picture`, or a tensor of another shape or range.
        TypeError: it is none of these.
    """
    if isinstance(image, str | Path):
        return read_picture(image, image_size)
    if isinstance(image, Image.Image):
        return _pixels(image, name, image_size)
    if isinstance(image, Tensor):
        square = _square(_from_tensor(image, name), image_size)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    raise TypeError(
        f"picture {name}: got {type(image).__name__}, expected a path, a PIL image or a tensor "
        "[3, Y, X]; convert it"
    )


def _from_tensor(image: Tensor, name: str) -> Image.Image:
    if image.dim() != 3 or image.shape[0] != 3 or not 0 < image[0].numel() <= MAX_PIXELS:
        raise ValueError(
            f"picture {name}: got a tensor {list(image.shape)}, expected [3, Y, X] of 1 to "
            f"{MAX_PIXELS} pixels; permute or repeat its channels"
        )
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(
                f"picture {name}: got floats from {low:g} to {high:g}, expected 0 to 1; undo what "
                "normalised them"
            )
        image = (image.float() * 255).round_().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise TypeError(
            f"picture {name}: got {image.dtype}, expected uint8 or floats from 0 to 1; convert it"
        )
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _pixels(opened: Image.Image, path: str | Path, image_size: int) -> Tensor:
    width, height = opened.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"picture {path}: got {width} x {height} pixels, expected 1 to {MAX_PIXELS}; scale it"
        )
    with _decoding(path):
        opened.load()
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    with _decoding(path, (ValueError,)):  # a colour space that has no conversion, such as LAB
        flat = on_white(opened)
    if orientation in UPRIGHT:
        flat = flat.transpose(UPRIGHT[orientation])
    return torch.from_numpy(np.array(_square(flat, image_size))).permute(2, 0, 1).contiguous()


class _Quiet:
    """Ignores warnings while any thread is inside: `catch_warnings` itself is of the process."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.caught.__exit__(None, None, None)


_quiet = _Quiet()


@contextmanager
def _decoding(path: str | Path, damage: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """What Pillow raises of a bad file as a ValueError of one line."""
    try:
        # MAX_PIXELS is the stricter bound, and damaged EXIF is read as far as it goes.
        with _quiet:
            yield
    except MemoryError as error:
        raise ValueError(
            f"picture {path}: got a picture that does not fit into memory, expected a smaller one; "
            "scale it down"
        ) from error
    except damage as error:
        # Pillow's own words name the open file by its address.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no format that Pillow knows" if unknown else error
        raise ValueError(
            f"picture {path}: got a file that does not decode ({reason}), expected a whole PNG or "
            "JPEG; save it again"
        ) from error


def on_white(drawing: Image.Image) -> Image.Image:
    """RGB of the same size, transparent parts white."""
    if drawing.mode.startswith(("I", "F")):
        drawing = Image.fromarray(_eight_bits(drawing.mode, np.asarray(drawing)))
    if not drawing.has_transparency_data:
        return drawing.convert("RGB")
    drawing = drawing.convert("RGBA")
    flat = Image.new("RGB", drawing.size, "white")
    flat.paste(drawing, mask=drawing)
    return flat


def _eight_bits(mode: str, values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Greys [Y, X] of 16 or 32 bits, scaled as `read_picture` says."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    tops = (1.0, 255.0) if mode == "F" else (65535.0,)
    if low >= 0 and high <= tops[-1]:
        low, high = 0.0, next(top for top in tops if high <= top)
    scaled = np.empty(values.size, np.uint8)
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float64)
        part = np.nan_to_num(part, nan=low, posinf=high, neginf=low)
        part = (part - low) * (255 / (high - low) if high > low else 0.0)
        scaled[start : start + CHUNK] = np.rint(part)
    return scaled.reshape(values.shape)


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The longer side becomes `side`; white beside the shorter, which keeps a pixel at least."""
    longest = max(picture.size)
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize(
            (width, height), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP
        )
    if width == height:
        return picture
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
