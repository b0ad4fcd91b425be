"""Captions from Python and from `caption generate`: what goes in, the formats that come out."""

import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mbm_kernels.captioning import Captioner, formats, sources
from mbm_kernels.captioning.cli import app
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.data.readers import read
from mbm_kernels.models import Sampling

from .training_helpers import colours, run_once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "colours"
    train_set = colours()
    words = WordTokenizer.train(train_set.captions)
    run_once(
        folder, train_set, words, steps=40, evaluate_every=40, learning_rate=5e-3, word_dropout=0
    )
    return folder


@pytest.fixture(scope="module")
def captioner(run):
    return Captioner.from_pretrained(run, layers="stock")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of the training set by colour, of another size, and a file that is none."""
    found = tmp_path_factory.mktemp("images")
    for k, pixels in enumerate(colours(3, 40).images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(found / f"é_{k + 7}.png")
    (found / "é_broken.png").write_text("no image")
    return found


def call(*arguments, stdin=None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def captions(run, *arguments, stdin=None):
    result = call(run, "--layers", "stock", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.exception
    return result.stdout_bytes.decode()


def test_images_of_every_kind_are_the_same_image(captioner, folder):
    paths = sorted(folder.glob("*[0-9].png"))
    expected = captioner.generate(paths)
    assert expected == [f"a dark {colour} square" for colour in ("red", "green", "blue")]
    opened = [Image.open(path) for path in paths]
    bytes_ = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in opened])
    assert captioner.generate(opened) == expected
    assert captioner.generate(bytes_) == expected
    assert captioner.generate(bytes_ / 255) == expected
    assert captioner.generate(x.double() / 255 for x in bytes_) == expected
    assert captioner.generate([str(paths[0]), opened[1], bytes_[2]], beam=2) == expected
    assert captioner.generate(str(paths[0])) == captioner.generate(bytes_[0]) == expected[:1]
    assert captioner.generate([]) == []


def test_an_image_in_memory_is_turned_and_flattened_as_a_file(captioner, tmp_path):
    pixels = np.zeros((20, 40, 4), np.uint8)
    pixels[:, :20] = (200, 30, 30, 255)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=image.getexif())
    with Image.open(tmp_path / "turned.png") as opened:
        from_memory, from_file = (
            next(captioner._pixels(x)) for x in (opened, tmp_path / "turned.png")
        )
    assert torch.equal(from_memory, from_file)
    assert from_memory[1:, :8, 4:12].float().mean() < 60 < 240 < from_memory[:, 8:].min()


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (torch.zeros(3, 8, 8) - 1, ValueError, "picture 0: got floats from -1 to -1, expected 0"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "got floats from nan"),
        (torch.zeros(1, 8, 8), ValueError, r"got a tensor \[1, 8, 8\], expected \[3, Y, X\]"),
        (torch.zeros(3, 0, 8), ValueError, r"\[3, 0, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "got torch.int64"),
        ("absent.png", FileNotFoundError, "absent.png: got no such file"),
        ([b"bytes"], TypeError, "picture 0: got bytes"),
        (3, TypeError, "images: got int"),
    ],
)
def test_what_is_no_image_is_refused(image, error, text, captioner):
    with pytest.raises(error, match=text):
        captioner.generate(image)


def test_drawn_captions_are_those_of_the_seed_in_any_batches(captioner, monkeypatch):
    images = colours(7).images
    how = Sampling(temperature=3, seed=5)
    whole = captioner.generate(images, sampling=how)
    monkeypatch.setattr("mbm_kernels.captioning.captioner.BATCH", 3)
    assert captioner.generate(images, sampling=how) == whole
    assert captioner.generate(images, sampling=Sampling(temperature=3, seed=6)) != whole


def test_every_format_holds_the_same_captions(run, captioner, folder, tmp_path):
    paths = sorted(str(path) for path in folder.glob("*[0-9].png"))
    said = dict(zip(paths, captioner.generate(paths), strict=True))
    lines = captions(run, folder).splitlines()
    assert dict(line.split("\t") for line in lines) == said
    assert json.loads(captions(run, folder, "--format", "json")) == [
        {"image": path, "caption": text} for path, text in said.items()
    ]
    rows = captions(run, folder, "--format", "jsonl").splitlines()
    assert {row["image"]: row["caption"] for row in map(json.loads, rows)} == said
    table = captions(run, folder, "--format", "csv")
    assert list(csv.reader(io.StringIO(table, newline=""))) == [
        ["image", "caption"],
        *map(list, said.items()),
    ]
    assert "é_7" in table
    assert json.loads(captions(run, *paths, "--format", "coco")) == [
        {"image_id": 7 + k, "caption": text} for k, text in enumerate(said.values())
    ]
    (tmp_path / "captions.csv").write_text(table)
    assert [entry.captions for entry in read(tmp_path / "captions.csv").entries.values()] == [
        [text] for text in said.values()
    ]


def test_ids_of_coco(tmp_path):
    given = [sources.Source(name) for name in ("a/COCO_val2014_000000000042.jpg", "b7.png")]
    assert list(formats.coco_ids(given, None).values()) == [42, 7]
    images = [{"file_name": "b7.png", "id": 3}, {"file_name": Path(given[0].name).name, "id": 9}]
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": images}))
    assert list(formats.coco_ids(given, path).values()) == [9, 3]
    with pytest.raises(ValueError, match=r"image other/b7\.jpg: got the id 7 of b7\.png"):
        formats.coco_ids([*given, sources.Source("other/b7.jpg")], None)
    with pytest.raises(ValueError, match=r"image c\.png: got no id for COCO's results"):
        formats.coco_ids([sources.Source("c.png")], path)
    path.write_text('{"images": [{"id": 3}]}')
    with pytest.raises(ValueError, match=r"got the image \{'id': 3\}"):
        formats.coco_ids(given, path)


def test_a_gallery_is_one_file_with_the_map_of_each_word(run, folder, tmp_path):
    output = tmp_path / "new" / "gallery.html"
    last = captions(run, folder, "--output", output)
    assert last == f"3 captions in {output}\n"
    page = output.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\((?!data:)", page)
    assert page.count('class="card"') == 3
    assert page.count('class="map"') == 12
    for word in ("dark", "blue", "é_7.png", "é_broken.png"):
        assert word in page
    hostile = tmp_path / "<b>&.png"
    Image.new("RGB", (9, 9)).save(hostile)
    assert "<b>&.png" not in captions(run, hostile, "--format", "html")


def test_standard_input_is_an_image_or_paths(run, folder, captioner):
    paths = sorted(folder.glob("*[0-9].png"))
    said = captioner.generate(paths)
    assert captions(run, "-", stdin=paths[1].read_bytes()) == said[1] + "\n"
    listing = "\n".join(map(str, [paths[2], folder / "absent.png", paths[0]])).encode()
    result = call(run, "--layers", "stock", "-", stdin=listing)
    assert result.stdout == f"{paths[2]}\t{said[2]}\n{paths[0]}\t{said[0]}\n"
    assert "absent.png: got no such file" in result.stderr
    for stdin, text in ((b"", "got nothing"), (b"\x89PNG\0\0", "got 6 bytes of neither")):
        result = call(run, "-", stdin=stdin)
        assert isinstance(result.exception, ValueError)
        assert f"standard input: {text}" in str(result.exception)


def test_a_name_that_is_no_text_comes_out_as_it_went_in(run, folder, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff_1.png")
    with open(name, "wb") as file:
        file.write((folder / "é_7.png").read_bytes())
    result = call(run, "--layers", "stock", "-", stdin=name + b"\n")
    assert result.stdout_bytes.startswith(name + b"\t")
    result = call(run, "--layers", "stock", "-", "--format", "json", stdin=name + b"\n")
    assert os.fsencode(json.loads(result.stdout_bytes)[0]["image"]) == name


def test_an_output_is_whole_or_as_before(run, folder, tmp_path, monkeypatch):
    output = tmp_path / "captions.json"
    output.write_text("before")
    broken = [path for path in folder.iterdir() if "broken" in path.name]
    assert isinstance(call(run, *broken, "--output", output).exception, ValueError)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_text("no image")
    result = call(run, tmp_path / "none", "--output", output)
    assert "got 1, of which none decodes" in str(result.exception)
    assert output.read_text() == "before"
    captions(run, folder, "--output", output)
    assert len(json.loads(output.read_text())) == 3
    assert list(tmp_path.glob(".*")) == []


def test_the_same_seed_draws_the_same_file(run, folder):
    options = ("--sample", "--temperature", 3, "--top-k", 9, "--top-p", 0.95)
    first = captions(run, folder, *options, "--seed", 1)
    assert captions(run, folder, *options, "--seed", 1) == first
    assert captions(run, folder, *options, "--seed", 2) != first
