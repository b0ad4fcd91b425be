"""`mbm-kernels retrieve`: the commands, and the one line that each kind of bad input ends in."""

import json
import os
import re
import shutil
import sys

import pytest
from typer.testing import CliRunner

from mbm_kernels.cli import main
from mbm_kernels.retrieval.cli import app
from tests.captioning import own_helpers

from .helpers import distinct, save_images

FAST = ["--layers", "stock", "--batch-size", "4", "--limit", "8", "--steps", "2"]
STOCK = ["--layers", "stock"]


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.exception
    return result


@pytest.fixture(scope="module")
def indexed(trained_run, tmp_path_factory):
    """A folder, its index and the run, all in one place."""
    home = tmp_path_factory.mktemp("indexed")
    shutil.copytree(trained_run, home / "run")
    save_images(home / "images", distinct())
    (home / "images" / "bad.png").write_text("no image")
    out = call("index", home / "images", "--model", home / "run", "--out", home / "i", *STOCK)
    assert "6 images, 1 that cannot be read; index in" in out.stdout
    assert "bad.png" in out.stderr
    return home


def test_data_of_ones_own_with_two_captions_an_image(tmp_path, monkeypatch):
    monkeypatch.setenv("MBM_CACHE", str(tmp_path / "cache"))
    path, images = own_helpers.write("coco", tmp_path)
    source = ("--data", path, "--images", images)
    out = call("train", "--out", tmp_path / "run", *source, *FAST)
    assert "step 2, loss " in out.stdout
    assert "train: 24 images" in out.stderr
    table = json.loads(call("eval", tmp_path / "run", *source, *STOCK, "--json").stdout)
    assert set(table) == {"val", "test"}
    # Two of the three images have a caption in common.
    expected = (2 * 2 / 3 + 4 / 3) / 6
    assert table["val"]["chance"]["text_to_image"]["R@1"] == pytest.approx(expected)


def test_text_finds_its_image(indexed):
    for caption in distinct().captions:
        lines = call("query", indexed / "i", caption, "--top", 2, *STOCK).stdout.splitlines()
        assert len(lines) == 2
        assert lines[0].endswith(f"{caption.replace(' ', '-')}.png")
        first, second = (float(line.split("\t")[0]) for line in lines)
        assert 1 >= first > second


def test_an_image_finds_itself(indexed):
    path = indexed / "images" / "a-bright-blue-square.png"
    out = call("query", indexed / "i", "--image", path, "--top", 9, "--json", *STOCK)
    found = json.loads(out.stdout)
    assert len(found) == 6
    assert found[0] == {"path": str(path), "similarity": pytest.approx(1, abs=1e-5)}


def test_an_image_that_is_gone_is_told(indexed, tmp_path):
    shutil.copytree(indexed, tmp_path / "copy")
    home = tmp_path / "copy"
    call("index", home / "images", "--model", home / "run", "--out", home / "i", *STOCK)
    (home / "images" / "a-dark-red-square.png").unlink()
    out = call("query", home / "i", "a dark red square", *STOCK)
    assert "1 of the images found are gone; make the index again" in out.stderr


def test_a_path_need_not_be_text(indexed, tmp_path):
    home = tmp_path / "copy"
    shutil.copytree(indexed, home)
    odd = os.fsdecode(b"\xff\xfe.png")
    (home / "images" / "a-dark-red-square.png").rename(home / "images" / odd)
    call("index", home / "images", "--model", home / "run", "--out", home / "i", *STOCK)
    out = call("query", home / "i", "a dark red square", "--top", 1, *STOCK)
    assert b"\xff\xfe.png" in out.stdout_bytes
    out = call("query", home / "i", "a dark red square", "--top", 1, "--json", *STOCK)
    assert json.loads(out.stdout)[0]["path"] == str(home / "images" / odd)


def test_train_and_eval(tmp_path):
    out = call("train", "--out", tmp_path / "run", *FAST)
    assert "step 2, loss " in out.stdout
    out = call("eval", tmp_path / "run", "--limit", 8, "--json", *STOCK)
    table = json.loads(out.stdout)
    assert set(table) == {"val", "held_out"}
    assert set(table["val"]["two_tower"]["image_to_text"]) == {"R@1", "R@5", "R@10"}
    text = call("eval", tmp_path / "run", "--limit", 8, "--split", "val", *STOCK).stdout
    assert text.startswith("val ")
    assert "held_out" not in text
    call("train", "--out", tmp_path / "run", *FAST, "--resume")


def end(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", "retrieve", *(str(x) for x in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


BAD = {
    "no query": (("query", "i"), "got neither, expected a text or --image"),
    "two queries": (("query", "i", "red", "--image", "x.png"), "got both, expected"),
    "no index": (("query", "absent", "red"), "got no such file, expected an index"),
    "a folder for an index": (("query", "images", "red"), "got no such file"),
    "a run for an index": (("query", "run/checkpoints.json", "red"), "cannot be read"),
    "unknown words": (("query", "i", "zebra", *STOCK), "no word that the model knows"),
    "no words": (("query", "i", "", *STOCK), "no word that the model knows"),
    "no image": (("query", "i", "--image", "absent.png", *STOCK), "got no such file"),
    "a bad image": (("query", "i", "--image", "images/bad.png", *STOCK), "does not decode"),
    "none wanted": (("query", "i", "red", "--top", "0", *STOCK), "top: got 0, expected"),
    "another model": (("query", "i", "red", "--model", "other", *STOCK), "another model than"),
    "a model that is gone": (("query", "i", "red", "--model", "gone"), "got no such folder"),
    "layers": (("query", "i", "red", "--layers", "jax"), "layers: got 'jax'"),
    "no folder": (("index", "absent", "--model", "run", "--out", "x"), "got no such folder"),
    "no images": (("index", "run", "--model", "run", "--out", "x", *STOCK), "got 0 images"),
    "no model": (("index", "images", "--model", "images", "--out", "x"), "no config.json"),
    "a data set": (("train", "--out", "new", "--data", "coco"), "coco"),
    "no steps": (("train", "--out", "new", "--steps", "0"), "steps: got 0"),
    "a run that is there": (("train", "--out", "run", *FAST), "got a folder with checkpoints"),
    "a run of towers": (("match-eval", "run", *STOCK), "format 'mbm_kernels.two_tower'"),
    "a split": (("eval", "run", "--limit", "4", "--split", "x", *STOCK), "split: got 'x'"),
}


@pytest.fixture
def here(indexed, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(indexed, home)
    monkeypatch.chdir(home)
    call("train", "--out", "other", *FAST)
    return home


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line(what, here, monkeypatch, capsys):
    arguments, reason = BAD[what]
    code, errors = end(monkeypatch, capsys, *arguments)
    assert code == 2
    assert re.fullmatch(r"(skipped: .*\n)*error: .*\bgot .+, expected .+\n", errors), errors
    assert reason in errors
    assert not list(here.glob("new/*")) + list(here.glob("x"))


def test_a_deleted_folder_ends_in_one_line(indexed, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    shutil.copytree(indexed, home)
    call("index", home / "images", "--model", home / "run", "--out", home / "i", *STOCK)
    shutil.rmtree(home / "images")
    code, errors = end(monkeypatch, capsys, "query", home / "i", "red")
    assert code == 2
    assert re.fullmatch(r"error: index .* got images of .*, a folder that is gone, .*\n", errors)


def test_match_and_its_ablations(tmp_path):
    assert "step 2, loss " in call("match", "--out", tmp_path / "run", *FAST).stdout
    out = call("match-eval", tmp_path / "run", "--limit", 8, "--json", *STOCK)
    tables = json.loads(out.stdout)
    assert set(tables) == {"val", "held_out"}
    assert set(tables["val"]["image+words+color"]) == {"hard", "other"}
    text = call("match-eval", tmp_path / "run", "--limit", 8, "--split", "val", *STOCK).stdout
    assert text.count("AUC hard") == 4
