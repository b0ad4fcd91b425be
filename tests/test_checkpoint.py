"""Checkpoints: whole or as before, and refused when damaged or foreign."""

import errno
import json

import pytest

from mbm_kernels._core import files
from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import collate
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    SETTINGS,
    Stop,
    assert_same,
    colours,
    make,
    run_once,
    stop_at,
    tokenizer,
    train_set,
    weights_of,
)


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "checkpoints.json"])
def test_full_disk_leaves_the_previous_checkpoint(
    broken, train_set, tokenizer, tmp_path, monkeypatch
):
    write = checkpoint.write_synced
    expected = {}

    def full(path, content):
        if expected and broken in path.name:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    monkeypatch.setattr(files, "write_synced", full)

    def remember():
        expected.update(weights_of(tmp_path))

    with pytest.raises(OSError, match="No space left") as caught:
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            SETTINGS,
            run=tmp_path,
            after_step=stop_at(4, remember),
        )
    assert caught.value.errno == errno.ENOSPC
    assert "saving the checkpoint of step 6 failed" in str(caught.value)
    if broken != "checkpoints.json":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "step-00000003"]
    assert_same(weights_of(tmp_path), expected)
    assert_same(weights_of(tmp_path, "best"), expected)
    monkeypatch.undo()
    fit(
        CrossEntropyObjective(make(tokenizer)),
        train_set,
        tokenizer,
        SETTINGS,
        run=tmp_path,
        resume=True,
    )
    assert checkpoint.load(tmp_path, layers="stock", which="latest").config["step"] == 6


def test_checkpoint_round_trip_in_both_layers(train_set, tokenizer, tmp_path):
    run_once(tmp_path, train_set, tokenizer)
    stock = checkpoint.load(tmp_path, layers="stock")
    fused = checkpoint.load(stock.path, layers="mbm")
    assert_same(stock.model.state_dict(), fused.model.state_dict())
    assert stock.tokenizer.encode("a dark red square") == tokenizer.encode("a dark red square")
    images, _, _ = collate(train_set, range(4), tokenizer)
    assert stock.model.generate(images, 6) == fused.model.generate(images, 6)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (truncate, ValueError, "model.safetensors of .* fails its checksum"),
    "flipped bit": (flip_a_bit, ValueError, "fails its checksum"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        FileNotFoundError,
        "no model.safetensors",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ValueError, "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "not JSON"),
    "foreign": (lambda f: edit_config(f, format="llama"), ValueError, "format 'llama'"),
    "newer": (lambda f: edit_config(f, version=99), ValueError, "version 99"),
    "other size": (
        lambda f: edit_config(
            f, model={**json.loads((f / "config.json").read_text())["model"], "size": "teacher"}
        ),
        ValueError,
        "where the model has",
    ),
    "odd model": (lambda f: edit_config(f, model={"depth": 3}), ValueError, "no captioner"),
    "index": (
        lambda f: (f.parent / "checkpoints.json").write_text('{"best": "../../etc"}'),
        ValueError,
        "best '../../etc' in checkpoints.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_foreign_checkpoint_is_refused(damage, train_set, tokenizer, tmp_path):
    run_once(tmp_path, train_set, tokenizer, steps=1, warmup=0)
    change, error, text = DAMAGE[damage]
    change(tmp_path / "step-00000001")
    with pytest.raises(error, match=text):
        checkpoint.load(tmp_path, layers="stock")
