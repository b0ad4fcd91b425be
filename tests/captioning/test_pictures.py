"""Image files of every mode and shape, and those that are no images."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from mbm_kernels.captioning import pictures
from mbm_kernels.captioning.pictures import read_picture
from tests import children

SIDE = 32
RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves():
    """Red above blue on the left, white above black on the right: no two turns look alike."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:30, :30], pixels[30:, :30], pixels[:30, 30:] = RED, BLUE, (255, 255, 255)
    return Image.fromarray(pixels)


def near(picture, expected, by=1):
    """Equal up to the rounding of bytes."""
    expected = torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1)
    assert picture.shape == expected.shape
    assert (picture.int() - expected.int()).abs().max() <= by


def shrunk(picture):
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_every_viewer_shows_it(orientation, suffix, tmp_path):
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    halves().resize((60, 40)).save(path, exif=exif, quality=95)
    with Image.open(path) as opened:
        viewed = ImageOps.exif_transpose(opened).convert("RGB")
    assert viewed.size == ((60, 40) if orientation < 5 else (40, 60))
    viewed.save(tmp_path / "viewed.png")
    picture, expected = read_picture(path, SIDE), read_picture(tmp_path / "viewed.png", SIDE)
    assert (picture.int() - expected.int()).abs().max() <= 1


def test_an_unknown_or_damaged_orientation_is_upright(tmp_path):
    for value in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = value
        halves().save(tmp_path / "odd.png", exif=exif)
        near(read_picture(tmp_path / "odd.png", SIDE), shrunk(halves()))
    halves().save(tmp_path / "odd.jpg", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_picture(tmp_path / "odd.jpg", SIDE).shape == (3, SIDE, SIDE)


def ramp(low, high, dtype):
    """[64, 64], the same grey in a row of the image that is read."""
    return np.repeat(np.linspace(low, high, 64), 64).reshape(64, 64).astype(dtype)


@pytest.mark.parametrize(
    ("suffix", "pixels", "expected"),
    [
        ("png", ramp(0, 65535, np.uint16), ramp(0, 255, float)),
        ("tiff", ramp(0, 65535, np.uint16), ramp(0, 255, float)),
        ("tiff", ramp(0, 65535, ">u2"), ramp(0, 255, float)),
        ("png", ramp(0, 255, np.uint16), ramp(0, 1, float)),  # 16 bits, though nearly black
        ("tiff", ramp(0, 65535, np.int32), ramp(0, 255, float)),
        ("tiff", ramp(100, 2**31 - 200, np.int32), ramp(0, 255, float)),
        ("tiff", ramp(-4000, 4000, np.int32), ramp(0, 255, float)),
        ("tiff", ramp(0, 1, np.float32), ramp(0, 255, float)),
        ("tiff", ramp(0.2, 0.4, np.float32), ramp(51, 102, float)),
        ("tiff", ramp(0, 255, np.float32), ramp(0, 255, float)),
        ("tiff", ramp(-3, 5, np.float32), ramp(0, 255, float)),
        ("tiff", ramp(0, 1e6, np.float32), ramp(0, 255, float)),
        ("tiff", ramp(7e8, 7e8, np.float32), ramp(0, 0, float)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.dtype.str} {x.min():.3g} to {x.max():.3g}",
)
def test_deep_greys_are_scaled_by_their_range(suffix, pixels, expected, tmp_path):
    path = tmp_path / f"deep.{suffix}"
    if pixels.dtype.str == ">u2":
        Image.frombytes("I;16B", (64, 64), pixels.tobytes()).save(path)
    else:
        Image.fromarray(pixels).save(path)
    picture = read_picture(path, 64).float()
    assert (picture - torch.from_numpy(expected)).abs().max() <= 1
    assert picture.mean().item() == pytest.approx(expected.mean(), abs=0.6)


def test_floats_that_are_not_finite(tmp_path):
    pixels = ramp(0, 1, np.float32)
    pixels[:8], pixels[8:16], pixels[16:24] = np.nan, np.inf, -np.inf
    Image.fromarray(pixels).save(tmp_path / "odd.tiff")
    rows = read_picture(tmp_path / "odd.tiff", 64)[0, :24, 0].view(3, 8)
    assert rows[:, 4].tolist() == [0, 255, 0]
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "odd.tiff")
    assert not read_picture(tmp_path / "odd.tiff", 9).any()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("RGB", "png"), ("CMYK", "jpg"), ("CMYK", "tiff"),
     ("YCbCr", "jpg"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "webp"), ("RGB", "ppm"), ("L", "pgm")],
)  # fmt: skip
def test_opaque_modes(mode, suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    halves().convert(mode).save(path, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    with Image.open(path) as opened:
        near(read_picture(path, SIDE), shrunk(opened))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode, tmp_path):
    black = Image.new("RGBA", (40, 40), (0, 0, 0, 255))
    black.paste((0, 0, 0, 0), (0, 0, 20, 40))
    black.convert(mode).save(tmp_path / "clear.png")
    half_clear(read_picture(tmp_path / "clear.png", 40))


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    flat = Image.new("RGB", (40, 40), "black")
    flat.paste((255, 255, 255) if mode == "1" else (255, 0, 0), (0, 0, 20, 40))
    flat = flat.convert(mode)
    flat.save(tmp_path / "clear.png", transparency=flat.getpixel((0, 0)))
    half_clear(read_picture(tmp_path / "clear.png", 40))


def half_clear(picture):
    assert (picture[:, :, :20] == 255).all()
    assert (picture[:, :, 20:] == 0).all()


def test_half_transparent_edges_do_not_darken(tmp_path):
    """Colour under full transparency is not seen, before or after the resizing."""
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawing.paste((255, 0, 0, 128), (0, 0, 64, 32))
    drawing.save(tmp_path / "half.png")
    picture = read_picture(tmp_path / "half.png", 16)
    assert (picture[0] == 255).all()
    assert picture[:, 2, 8].tolist() == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame(suffix, tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"moving.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **lossless)
    assert read_picture(path, 8)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("size", "expected"), [((90, 40), (0, 18, 64, 28)), ((40, 90), (18, 0, 28, 64))]
)
def test_padding_is_white_and_centred(size, expected, tmp_path):
    Image.new("RGB", size, "black").save(tmp_path / "wide.png")
    picture = read_picture(tmp_path / "wide.png", 64)
    left, top, width, height = expected
    assert not picture[:, top : top + height, left : left + width].any()
    assert (picture == 0).sum() == 3 * width * height
    assert picture.unique().tolist() == [0, 255]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 200), (64, 64)])
def test_small_pictures_grow(size, tmp_path):
    Image.new("RGB", size, "red").save(tmp_path / "small.png")
    picture = read_picture(tmp_path / "small.png", 64)
    assert picture.shape == (3, 64, 64)
    assert picture[:, 32, 32].tolist() in ([255, 0, 0], [255, 255, 255])
    assert (picture[1] == 0).any()


THIN = """
import os, resource, time
from PIL import Image
from mbm_kernels.captioning.pictures import read_picture
for number, size in enumerate(((60000, 1), (1, 60000), (1 << 25, 2), (8192, 8192))):
    path = f"{number}.png"
    if os.fork() == 0:  # the most memory of one is not that of the others
        Image.new("1", size).save(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        read_picture(path, 64)
        seconds = time.process_time() - start
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(size, kibibytes, seconds, os.path.getsize(path), sep=";", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_any_ratio_is_read_in_bounded_memory(tmp_path):
    """1 << 25 by 2 is as far as the bound on pixels lets a PNG go: padded it had 4.5 PB."""
    done = children.python("-c", THIN, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        size, kibibytes, seconds, length = line.split(";")
        assert int(kibibytes) < 900 * 1024, size
        assert float(seconds) < 30, size
        assert int(length) < 1 << 20, size


def refused(text, path):
    with pytest.raises(ValueError, match=text) as caught:
        read_picture(path, SIDE)
    assert "\n" not in str(caught.value)
    assert f"picture {path}: got" in str(caught.value)
    assert ", expected" in str(caught.value)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("1", (8192, 8193)).save(small)
    Image.new("1", (20000, 20000)).save(large)  # past Pillow's own limit too
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: pytest.fail("decoded"))
    refused("got 8192 x 8193 pixels, expected 1 to 67108864; scale it", small)
    refused("does not decode .*exceeds limit", large)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "does not fit into memory, expected a smaller one; scale it down"),
        (ValueError("conversion from XYZ to RGB not supported"), "does not decode .*from XYZ"),
    ],
)
def test_no_memory_or_no_conversion_ends_in_one_line(error, text, tmp_path, monkeypatch):
    def fails(picture):
        raise error

    monkeypatch.setattr(pictures, "on_white", fails)
    halves().save(tmp_path / "large.png")
    refused(text, tmp_path / "large.png")


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"no picture", b"\0" * 99]
)
def test_what_is_no_picture(content, tmp_path):
    (tmp_path / "odd.png").write_bytes(content)
    refused("got a file that does not decode", tmp_path / "odd.png")


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="got no such file, expected a PNG or JPEG"):
            read_picture(path, SIDE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp", "ppm"])
def test_damage_anywhere_is_a_picture_or_one_line(suffix, tmp_path):
    content, path = io.BytesIO(), tmp_path / f"damaged.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = {"jpg": "jpeg"}.get(suffix, suffix)
    extra = {"exif": exif} if suffix in ("png", "jpg", "webp", "tiff") else {}
    halves().save(content, kind, **extra)
    whole, rng = content.getvalue(), random.Random(suffix)
    refusals = 0
    for trial in range(150):
        broken = bytearray(whole[: rng.randrange(len(whole))] if trial % 3 == 0 else whole)
        # Headers are a small share of the bytes and most of what can go wrong.
        for _ in range(rng.randrange(1, 4)):
            if broken:
                at = rng.randrange(min(len(broken), 120 if trial % 2 else len(broken)))
                broken[at] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            picture = read_picture(path, SIDE)
        except ValueError as error:
            odd = str(error)
        else:
            odd = ""
            assert picture.shape == (3, SIDE, SIDE)
        refusals += bool(odd)
        assert odd.startswith(f"picture {path}: got ") or not odd
    assert refusals
