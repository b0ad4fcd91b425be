"""`mbm-kernels caption`: the commands, and the one line that each kind of bad input ends in."""

import json
import signal
import sys
from dataclasses import replace

import pytest
from PIL import Image
from typer.testing import CliRunner

from mbm_kernels.captioning import checkpoint, data
from mbm_kernels.captioning.cli import app
from mbm_kernels.cli import main
from mbm_kernels.models.captioner_config import SIZES
from tests import children

FAST = ["--layers", "stock", "--batch-size", "4", "--limit", "8", "--steps", "2"]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(error, text, *arguments):
    result = call(*arguments)
    assert isinstance(result.exception, error), result.output
    assert text in str(result.exception)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    teacher, student = folder / "teacher", folder / "student"
    assert call("train", "--run", teacher, *FAST).exit_code == 0
    result = call("distill", "--run", student, "--teacher", teacher, *FAST)
    assert result.exit_code == 0, result.exception
    assert "step 2, loss " in result.output
    return {"teacher": teacher, "student": student}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    pixels = data.load("scenes", limit=1)["val"].images[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
    return path


def test_train_and_distill_write_runs(runs):
    for name, run in runs.items():
        assert checkpoint.load(run, layers="stock").model.config == replace(
            SIZES[name], image_size=56
        )
    config = checkpoint.load(runs["student"], layers="stock").config
    assert set(config["history"]["train"][-1]) == {
        "step", "loss", "hard", "soft", "features"
    }  # fmt: skip


def test_eval_prints_scores(runs):
    result = call("eval", runs["student"], "--limit", 8, "--layers", "stock", "--json")
    scores = json.loads(result.stdout)
    assert set(scores) == {"val", "held_out"}
    assert set(scores["val"]) >= {"exact_match", "bleu4", "rouge_l", "cider_d"}
    one = call("eval", runs["student"], "--limit", 8, "--layers", "stock", "--split", "val")
    head, row = one.stdout.splitlines()
    assert len(head) == len(row)
    exact, *_, cider = row.removeprefix("val").split()
    assert (exact, cider) == (
        f"{100 * scores['val']['exact_match']:.1f}",
        f"{scores['val']['cider_d']:.2f}",
    )


def test_generate_captions_files_of_any_size_and_mode(runs, picture, tmp_path):
    other = tmp_path / "wide.jpg"
    Image.new("L", (90, 40), 128).save(other)
    maps = tmp_path / "maps"
    result = call(
        "generate", runs["student"], picture, other, "--layers", "stock", "--max-length", 5,
        "--beam", 2, "--attention-maps", maps,
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(picture), str(other)]
    sheets = sorted(path.name for path in maps.iterdir())
    assert sheets == ["000-scene.png", "001-wide.png"]
    words = len(lines[0].split("\t")[1].replace(",", " ,").split())
    with Image.open(maps / "000-scene.png") as sheet:
        assert sheet.size == (128 * max(1, words), 144)


def test_resume_continues(runs, tmp_path):
    run = tmp_path / "run"
    assert call("train", "--run", run, *FAST).exit_code == 0
    refused(ValueError, "got a folder with checkpoints", "train", "--run", run, *FAST)
    assert call("train", "--run", run, *FAST, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "data: got 'coco'", ["train", "--run", "x", "--data", "coco"]),
        (ValueError, "size: got 'huge'", ["train", "--run", "x", "--size", "huge", *FAST]),
        (ValueError, "steps: got 0", ["train", "--run", "x", "--steps", "0"]),
        (ValueError, "layers: got 'jax'", ["train", "--run", "x", "--limit", "8", "--steps", "2",
                                           "--batch-size", "4", "--layers", "jax"]),
        (FileNotFoundError, "no such folder", ["eval", "absent"]),
        (FileNotFoundError, "no such folder", ["distill", "--run", "x", "--teacher", "absent"]),
        (FileNotFoundError, "no checkpoint to resume", ["train", "--run", "x", *FAST, "--resume"]),
    ],
)  # fmt: skip
def test_bad_arguments(error, text, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(error, text, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_empty_data_folder(tmp_path):
    arguments = ["train", "--run", tmp_path / "run", "--data", "emoji", "--root", tmp_path]
    refused(ValueError, "caption prepare emoji", *arguments)


def test_bad_pictures_and_splits(runs, picture, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:-200])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for bad in (cut, text):
        refused(ValueError, f"picture {bad}: got a file that", "generate", runs["student"], bad)
    refused(FileNotFoundError, "got no such file", "generate", runs["student"], tmp_path / "no.png")
    evaluation = ["eval", runs["student"], "--limit", 4, "--layers", "stock"]
    refused(ValueError, "split: got 'test', expected one of", *evaluation, "--split", "test")


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", "caption", "eval", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "no such folder, expected a run or a checkpoint" in errors


def test_ctrl_c_ends_in_one_line_and_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    command = ("-m", "mbm_kernels", "caption", "train", "--run", run, *FAST[:-1], "100000")
    child = children.Child(*command, environment={"COLUMNS": "200"})
    child.wait_for("loss")
    child.signal(signal.SIGINT)
    done = child.end(60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0
    found = checkpoint.load(run, layers="stock", which="latest")
    assert 0 < found.config["step"] < 100000
