"""`mbm-kernels caption` on data of one's own: prepare, train, distil, evaluate, caption."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.cli import app
from mbm_kernels.captioning.data import fashion, tuxpaint
from mbm_kernels.captioning.data.manifest import MANIFEST
from mbm_kernels.cli import main

from .debian_helpers import COUNTS, data_tar, deb, photographs, stamps
from .own_helpers import FORMATS, image_bytes, write, write_images

FAST = ("--layers", "stock", "--batch-size", 4, "--steps", 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def given(path, images):
    return ("--data", path, *(() if images is None else ("--images", images)))


def end(monkeypatch, capsys, *arguments):
    """Exit status and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", "caption", *(str(x) for x in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_train_evaluate_and_caption(format, tmp_path):
    source = given(*write(format, tmp_path))
    run = tmp_path / "run"
    options = ("--image-size", 24, "--size", "student")
    result = call("train", "--out", run, *source, *FAST, *options)
    assert "step 2, loss " in result.output
    assert "train: 24 images" in result.output or format == "karpathy"
    shutil.move(tmp_path / "cache", tmp_path / "gone")  # the checkpoint needs nothing of the data
    found = checkpoint.load(run, layers="stock")
    assert found.model.image_size == 24
    assert found.tokenizer.decode(found.tokenizer.encode("a red square")) == "a red square"
    other = tmp_path / "other.png"
    other.write_bytes(image_bytes(4))
    assert (
        call("generate", run, other, "--layers", "stock", "--max-length", 4).stdout.count("\n") == 1
    )
    result = call("eval", run, *source, "--layers", "stock", "--json")
    scores = json.loads(result.stdout)
    assert set(scores) == {"val", "test"}
    assert set(scores["val"]) >= {"exact_match", "bleu4", "rouge_l", "cider_d"}


def test_prepare_train_distil_resume(tmp_path):
    path, images = write("coco", tmp_path)
    teacher, student, made = tmp_path / "teacher", tmp_path / "student", tmp_path / "made"
    result = call("prepare", path, "--images", images, "--out", made, "--image-size", 16,
                  "--seed", 3, "--workers", 2)  # fmt: skip
    assert f"data: COCO, {path}" in result.stdout
    assert "val: 3 images, 6 captions" in result.stdout
    assert str(made / MANIFEST) in result.stdout
    source = ("--data", made)
    call("train", "--run", teacher, *source, *FAST, "--image-size", 16)
    call("distill", "--out", student, "--teacher", teacher, *source, *FAST)
    assert checkpoint.load(student, layers="stock").model.config.hidden == 192
    call("distill", "--out", student, "--teacher", teacher, *source, *FAST, "--resume")


def test_a_student_learns_colours(tmp_path):
    source = given(*write("csv", tmp_path))
    run = tmp_path / "run"
    torch.manual_seed(0)
    call("train", "--out", run, *source, "--layers", "stock", "--batch-size", 16, "--steps", 150,
         "--image-size", 16, "--size", "student", "--learning-rate", "5e-3")  # fmt: skip
    result = call("eval", run, *source, "--layers", "stock", "--json", "--split", "test")
    assert json.loads(result.stdout)["test"]["bleu4"] > 40


def test_generate_takes_folders_and_leaves_what_does_not_decode(tmp_path):
    path, images = write("csv", tmp_path)
    run = tmp_path / "run"
    call("train", "--out", run, *given(path, images), *FAST, "--image-size", 16)
    folder = write_images(tmp_path / "more" / "deep", 3).parent
    (folder / "bad.png").write_text("no image")
    result = call("generate", run, folder, images / "000.png", "--layers", "stock",
                  "--attention-maps", tmp_path / "maps")  # fmt: skip
    named = [line.split("\t")[0] for line in result.stdout.splitlines()]
    expected = [str(folder / "deep" / f"{k:03d}.png") for k in range(3)]
    assert named == [*expected, str(images / "000.png")]
    assert f"picture {folder / 'bad.png'}: got a file that does not decode" in result.stderr
    assert len(list((tmp_path / "maps").iterdir())) == 4


def test_resume_on_other_data_is_refused(tmp_path, monkeypatch, capsys):
    path, images = write("csv", tmp_path)
    train = ("train", "--out", tmp_path / "run", *given(path, images), *FAST, "--image-size", 16)
    call(*train)
    os.utime(path)
    os.utime(images / "001.png")
    call(*train, "--resume")
    (images / "000.png").write_bytes(image_bytes(0) + b"changed")
    code, errors = end(monkeypatch, capsys, *train, "--resume")
    assert code == 2
    assert "resume with the settings that it began with" in errors


BAD = {
    "no such path": ("train", "--data", "absent.csv"),
    "no such path to prepare": ("prepare", "absent.csv"),
    "no folder of images": ("train", "--data", "table.csv", "--images", "absent"),
    "the wrong folder of images": ("train", "--data", "table.csv", "--images", "none"),
    "images of a built-in set": ("train", "--images", "images", "--limit", 8),
    "an odd size": ("train", "--data", "table.csv", "--images", "images", "--image-size", 20),
    "a tiny size": ("prepare", "table.csv", "--images", "images", "--image-size", 8),
    "no workers": ("prepare", "table.csv", "--images", "images", "--workers", 0),
    "a negative seed": ("prepare", "table.csv", "--images", "images", "--seed", -1),
    "fewer images than a batch": (
        "train", "--data", "table.csv", "--images", "images", "--batch-size", 100,
    ),
    "cut JSON": ("train", "--data", "cut.json"),
    "a folder of nothing": ("prepare", "none"),
    "the demo": ("demo", "--data", "table.csv"),
    "no train split": ("train", "--data", "tests.csv", "--images", "images"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line(what, tmp_path, monkeypatch, capsys):
    write("csv", tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "tests.csv").write_text("image,caption,split\n000.png,x,test\n")
    arguments = list(BAD[what])
    if arguments[0] == "train":
        arguments += ["--out", "new", "--layers", "stock", "--steps", 2]
    code, errors = end(monkeypatch, capsys, *arguments)
    lines = [line for line in errors.splitlines() if not line.startswith("decoding")]
    assert code == 2
    assert len(lines) == 1
    assert re.fullmatch(r"error: .*\bgot .+, expected .+", lines[0]), errors
    assert not list(tmp_path.glob("new/*"))


def test_training_by_pieces(tmp_path):
    source = given(*write("csv", tmp_path))
    run = tmp_path / "run"
    call("train", "--out", run, *source, *FAST, "--image-size", 16, "--pieces", 30)
    found = checkpoint.load(run, layers="stock")
    assert found.tokenizer.vocab_size == 34
    assert found.tokenizer.decode(found.tokenizer.encode("greenred")) == "greenred"


@pytest.mark.parametrize("name", ["tuxpaint", "fashion"])
def test_sets_out_of_packages_train_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tuxpaint, "LEAST", 4)
    monkeypatch.setattr(fashion, "COUNTS", COUNTS)
    deb(tmp_path / "tuxpaint-stamps-default_1_all.deb", data_tar(stamps()))
    deb(tmp_path / "dataset-fashion-mnist_1_all.deb", data_tar(photographs()))
    result = call("prepare", name, "--from-dir", tmp_path)
    assert str(tmp_path / "cache" / name) in result.stdout
    run = tmp_path / "run"
    options = ("--layers", "stock", "--batch-size", 2, "--steps", 2, "--size", "student")
    call("train", "--out", run, "--data", name, *options)
    scores = json.loads(call("eval", run, "--data", name, "--layers", "stock", "--json").stdout)
    assert set(scores) == ({"val", "test"} if name == "tuxpaint" else {"test"})


def test_a_set_that_was_not_fetched_says_how(tmp_path, monkeypatch, capsys):
    code, errors = end(monkeypatch, capsys, "train", "--out", "new", "--data", "fashion")
    assert code == 2
    assert "run `mbm-kernels caption prepare fashion`" in errors
