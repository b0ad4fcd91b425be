"""Bad input to `mbm-kernels caption` ends in one line; a bug does not."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from mbm_kernels.bench import exits
from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning import cli as caption
from mbm_kernels.cli import main

FAST = ("--layers", "stock", "--batch-size", "4", "--limit", "8", "--steps", "2")


def end(monkeypatch, capsys, *arguments):
    """Exit status and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", *(str(x) for x in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["mbm-kernels", "caption", "train", "--run", str(run), *FAST])
    with pytest.raises(SystemExit) as caught:
        main()
    patch.undo()
    assert caught.value.code == 0
    return run


@pytest.fixture
def files(trained, tmp_path, monkeypatch):
    """A run in `run`, an image, and files that are neither, in the current folder."""
    shutil.copytree(trained, tmp_path / "run")
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    (tmp_path / "text").write_text("no picture, no folder")
    (tmp_path / "big.toml").write_text("hidden = 65536\n")
    (tmp_path / "odd.json").write_text('{"depths": 3}')
    (tmp_path / "side.toml").write_text("image_size = 32\n")
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "manifest.json").write_text('{"labels": {"1F600": 3}}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


STEP = Path("run") / "step-00000002"


def config(**changes):
    def change():
        path = STEP / "config.json"
        found = {**json.loads(path.read_text()), **changes}
        found = {name: value for name, value in found.items() if value is not Ellipsis}
        if isinstance(found.get("sha256"), dict):
            found["sha256"]["config.json"] = checkpoint.config_checksum(found)
        path.write_text(json.dumps(found))

    return change


def write(path, content):
    return lambda: (Path("run") / path).write_bytes(content)


def cut(name):
    def change():
        path = STEP / name
        path.write_bytes(path.read_bytes()[:-9])

    return change


def folder(name):
    def change():
        (STEP / name).unlink()
        (STEP / name).mkdir()

    return change


EVAL = ("eval", "run", "--limit", "4", "--layers", "stock")
RESUME = ("train", "--run", "run", *FAST, "--resume")
IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
OLD = {"size": "teacher", "attention": "additive", "image_size": 64, **IDS}
DAMAGE = {
    "an index that is no JSON": (write("checkpoints.json", b"{"), EVAL),
    "an index that is a list": (write("checkpoints.json", b"[]"), EVAL),
    "an index of numbers": (write("checkpoints.json", b'{"best": 3}'), EVAL),
    "an index in no encoding": (write("checkpoints.json", b"\xff\xfe\x00"), EVAL),
    "an index of nothing": (write("checkpoints.json", b"{}"), EVAL),
    "an index of a step that is not there": (
        write("checkpoints.json", b'{"best": "step-00000009"}'),
        EVAL,
    ),
    "a config that is no JSON": (lambda: (STEP / "config.json").write_text("nul"), EVAL),
    "a config without its model": (config(model=...), EVAL),
    "a config with a list for a model": (config(model=[]), EVAL),
    "a config without checksums": (config(sha256=...), EVAL),
    "a config without a format": (config(format=...), EVAL),
    "a config of a vocabulary that fills the memory": (
        config(model={"vocab_size": 10**12, "config": {}, **IDS}),
        EVAL,
    ),
    "an older config of such a vocabulary": (config(model={"vocab_size": 10**12, **OLD}), EVAL),
    "a config of no model": (
        config(model={"vocab_size": 9, "config": {"hidden": "many"}, **IDS}),
        EVAL,
    ),
    "a config without a history": (config(history=...), RESUME),
    "a config without a best loss": (config(best_loss=...), RESUME),
    "a config without its settings": (config(training=...), RESUME),
    "a config with text for a step": (config(step="two"), RESUME),
    "weights that are cut": (cut("model.safetensors"), EVAL),
    "weights that are a folder": (folder("model.safetensors"), EVAL),
    "words that are cut": (cut("tokenizer.json"), EVAL),
    "moments that are cut": (cut("training.safetensors"), RESUME),
    "moments that are gone": (lambda: (STEP / "training.safetensors").unlink(), RESUME),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_ends_in_one_line(damage, files, monkeypatch, capsys):
    change, arguments = DAMAGE[damage]
    change()
    code, errors = end(monkeypatch, capsys, "caption", *arguments)
    assert code == 2
    assert re.fullmatch(r"error: (checkpoint|run) \S+: got .+, expected .+; .+\n", errors), errors


BAD = {
    "data": ("train", "--run", "new", "--data", "coco"),
    "data to prepare": ("prepare", "coco"),
    "data of the demo": ("demo", "--data", "coco", "--out", "new"),
    "data to evaluate on": (*EVAL, "--data", "coco"),
    "a checkpoint": ("eval", "absent"),
    "a file for a checkpoint": ("eval", "text"),
    "a teacher": ("distill", "--run", "new", "--teacher", "emoji", *FAST),
    "a split": (*EVAL, "--split", "test"),
    "no hypotheses": (*EVAL, "--beam", "0"),
    "no words": ("generate", "run", "good.png", "--max-length", "0", "--layers", "stock"),
    "a seed": ("train", "--run", "new", *FAST, "--seed", "-1"),
    "no pictures": (*EVAL[:2], "--limit", "0"),
    "fewer pictures than a batch": ("train", "--run", "new", *FAST, "--batch-size", "9"),
    "no steps": ("train", "--run", "new", *FAST, "--steps", "0"),
    "no rate": ("train", "--run", "new", *FAST, "--learning-rate", "nan"),
    "too great a rate": ("train", "--run", "new", *FAST, "--learning-rate", "inf"),
    "attention": ("train", "--run", "new", *FAST, "--attention", "flash"),
    "layers": ("train", "--run", "new", *FAST, "--layers", "jax"),
    "a file for a model's configuration": (
        "train",
        "--run",
        "new",
        *FAST,
        "--model-config",
        "text",
    ),
    "a configuration past all memory": (
        "train",
        "--run",
        "new",
        *FAST,
        "--model-config",
        "big.toml",
    ),
    "an unknown field": ("train", "--run", "new", *FAST, "--model-config", "odd.json"),
    "another image size than the teacher's": (
        *("distill", "--run", "new", "--teacher", "run", *FAST),
        *("--model-config", "side.toml"),
    ),
    "a temperature without drawing": ("generate", "run", "good.png", "--temperature", "2"),
    "no temperature": ("generate", "run", "good.png", "--sample", "--temperature", "0"),
    "hypotheses that are drawn": ("generate", "run", "good.png", "--sample", "--beam", "2"),
    "a format": ("generate", "run", "good.png", "--format", "xml"),
    "no id": ("generate", "run", "good.png", "--format", "coco"),
    "annotations of nothing": (
        *("generate", "run", "good.png", "--format", "coco", "--annotations", "odd.json"),
    ),
    "annotations of no use": ("generate", "run", "good.png", "--annotations", "odd.json"),
    "a folder for the output": ("generate", "run", "good.png", "--output", "emoji"),
    "an output below a file": ("generate", "run", "good.png", "--output", "text/new.csv"),
    "standard input twice": ("generate", "run", "-", "-"),
    "a size": ("train", "--run", "new", *FAST, "--size", "huge"),
    "a file for a run": ("train", "--run", "text", *FAST),
    "a run below a file": ("train", "--run", "text/run", *FAST),
    "a file for the demo's folder": ("demo", "--out", "text", "--limit", "8", "--steps", "1"),
    "a run that is there": ("train", "--run", "run", *FAST),
    "other settings": ("train", "--run", "run", *FAST, "--steps", "3", "--resume"),
    "a picture": ("generate", "run", "absent.png"),
    "a folder for a picture": ("generate", "run", "emoji"),
    "text for a picture": ("generate", "run", "text"),
    "a cut picture": ("generate", "run", "good.png", "cut.png"),
    "no emoji": ("train", "--run", "new", "--data", "emoji", "--root", "absent"),
    "a file for emoji": ("train", "--run", "new", "--data", "emoji", "--root", "text"),
    "damaged emoji": ("train", "--run", "new", "--data", "emoji", "--root", "emoji"),
    "no packages": ("prepare", "emoji", "--cache-dir", "new", "--from-dir", "emoji"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing(what, files, monkeypatch, capsys):
    code, errors = end(monkeypatch, capsys, "caption", *BAD[what])
    assert code == 2
    assert re.fullmatch(r"error: .*\bgot .+[,;] expected .+\n", errors), errors
    assert not list(Path().glob("new/*")), "nothing was trained or prepared"


def test_a_file_that_cannot_be_read(files, monkeypatch, capsys):
    """To root every file can: the disk says no instead."""
    real = Path.read_bytes

    def read(path):
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    code, errors = end(monkeypatch, capsys, "caption", *EVAL)
    assert code == 2
    assert "got a model.safetensors that cannot be read (Permission denied), expected" in errors
    assert errors.count("\n") == 1


def fail(error):
    def command(*arguments, **options):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: got no more memory (), expected enough; take fewer or smaller"),
        (RuntimeError("two\n  lines"), "error: two lines"),
        (ValueError(), "error: ValueError"),
    ],
)
def test_any_message_is_one_line(error, line, files, monkeypatch, capsys):
    monkeypatch.setattr(caption, "evaluate", fail(error))
    code, errors = end(monkeypatch, capsys, "caption", *EVAL)
    assert code == 2
    assert errors.startswith(line)
    assert errors.count("\n") == 1


@pytest.mark.parametrize("bug", [KeyError("x"), IndexError(), AttributeError(), AssertionError()])
def test_a_bug_keeps_its_traceback(bug, files, monkeypatch, capsys):
    monkeypatch.setattr(caption, "evaluate", fail(bug))
    code, errors = end(monkeypatch, capsys, "caption", *EVAL)
    assert code == exits.INTERNAL
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith(type(bug).__name__)


def test_debug_keeps_every_traceback(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", "--debug", "caption", "eval", "absent"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        main()
