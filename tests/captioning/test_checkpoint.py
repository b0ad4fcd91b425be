"""Checkpoints: whole or as before, and refused when damaged or foreign."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mbm_kernels._core import files
from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.data import collate
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit
from mbm_kernels.models import CaptionerConfig

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
        names = ["README.md", "checkpoints.json", "step-00000003"]
        assert sorted(p.name for p in tmp_path.iterdir()) == names
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


def edit_config(folder, seal=False, **changes):
    """`seal`: with a checksum that fits, as from a program that writes such folders."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    if seal:
        config["sha256"]["config.json"] = checkpoint.config_checksum(config)
    path.write_text(json.dumps(config))


def edit_model(folder, **changes):
    model = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, seal=True, model={**model, **changes})


def edit_words(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("red", "rot"))


def flip_a_bit_of_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 3'))


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
        lambda f: edit_model(f, config={"image_size": 16, "hidden": 64}),
        ValueError,
        "where the model has",
    ),
    "odd model": (
        lambda f: edit_config(f, seal=True, model={"depth": 3}),
        ValueError,
        "no captioner",
    ),
    "huge vocabulary": (
        lambda f: edit_model(f, vocab_size=10**6),
        ValueError,
        r"where the model has torch.float32 \(1000000,",
    ),
    "vocabulary past all memory": (
        lambda f: edit_model(f, vocab_size=10**12),
        ValueError,
        "no captioner: .* parameters",
    ),
    "vocabulary past all numbers": (
        lambda f: edit_model(f, vocab_size=10**30),
        ValueError,
        "no captioner",
    ),
    "huge picture": (
        lambda f: edit_model(f, config={"image_size": 8 * 10**6}),
        ValueError,
        "8 to 8192",
    ),
    "text for a number": (
        lambda f: edit_model(f, vocab_size="many"),
        ValueError,
        "no captioner: .*'many'",
    ),
    "true for a number": (lambda f: edit_model(f, pad_id=False), ValueError, "no captioner"),
    "no step": (lambda f: edit_config(f, seal=True, step=None), ValueError, "step None"),
    "version of another kind": (lambda f: edit_config(f, version=[2]), ValueError, r"version \[2"),
    "deep JSON": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        ValueError,
        "not JSON",
    ),
    "other words": (edit_words, ValueError, "tokenizer.json of .* fails its checksum"),
    "no words": (
        lambda f: (f / "tokenizer.json").unlink(),
        FileNotFoundError,
        "no tokenizer.json",
    ),
    "other step": (flip_a_bit_of_config, ValueError, "config.json that fails its checksum"),
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


def test_a_folder_mixed_of_two_checkpoints_is_refused(train_set, tokenizer, tmp_path):
    for name, steps in (("first", 1), ("second", 2)):
        run_once(tmp_path / name, train_set, tokenizer, steps=steps, warmup=0)
    theirs, ours = tmp_path / "first" / "step-00000001", tmp_path / "second" / "step-00000002"
    for file in ("model.safetensors", "training.safetensors", "config.json"):
        whole = (ours / file).read_bytes()
        (ours / file).write_bytes((theirs / file).read_bytes())
        with pytest.raises(ValueError, match="fails its checksum"):
            checkpoint.load_training(checkpoint.load(ours, layers="stock"))
        (ours / file).write_bytes(whole)
    checkpoint.load_training(checkpoint.load(ours, layers="stock"))


def test_a_checkpoint_of_the_first_version_is_read(train_set, tokenizer, tmp_path):
    """It knew no checksum of its config and its tokenizer."""
    run_once(tmp_path, train_set, tokenizer, steps=1, warmup=0)
    folder = tmp_path / "step-00000001"
    sums = json.loads((folder / "config.json").read_text())["sha256"]
    kept = {name: sums[name] for name in ("model.safetensors", "training.safetensors")}
    edit_config(folder, version=1, sha256=kept)
    assert checkpoint.load(tmp_path, layers="stock").tokenizer.vocab_size == tokenizer.vocab_size
    flip_a_bit(folder)
    with pytest.raises(ValueError, match="fails its checksum"):
        checkpoint.load(tmp_path, layers="stock")


def older(folder):
    """As it was before the captioner had a configuration."""
    model = json.loads((folder / "config.json").read_text())["model"]
    found = model.pop("config")
    named = {"size": "student", "attention": found["attention"], "image_size": 16}
    edit_config(folder, seal=True, model={**model, **named})


def test_a_checkpoint_with_a_size_by_name_is_read_and_resumed(train_set, tokenizer, tmp_path):
    def go_on(**options):
        objective = CrossEntropyObjective(make(tokenizer))
        fit(objective, train_set, tokenizer, SETTINGS, run=tmp_path / "cut", **options)

    def stop():
        raise Stop

    run_once(tmp_path / "whole", train_set, tokenizer)
    with pytest.raises(Stop):
        go_on(after_step=stop_at(4, stop))
    older(tmp_path / "cut" / "step-00000003")
    loaded = checkpoint.load(tmp_path / "cut", layers="stock").model
    assert loaded.config == CaptionerConfig(image_size=16)
    go_on(resume=True)
    assert_same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


def test_nothing_is_allocated_before_the_weights_are_compared(train_set, tokenizer, tmp_path):
    run_once(tmp_path, train_set, tokenizer, steps=1, warmup=0)
    edit_model(tmp_path / "step-00000001", vocab_size=10**6)
    made = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.device.type != "meta":
                made.append(out.untyped_storage().nbytes())
            return out

    with Counting(), pytest.raises(ValueError, match="where the model has"):
        checkpoint.load(tmp_path, layers="stock")
    assert max(made, default=0) < 10_000_000


@pytest.mark.parametrize(
    "damage",
    [
        {"history": None},
        {"history": {"train": 3}},
        {"history": {"train": [], "epochs": []}},
        {"best_loss": "low"},
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_gone_on_from(damage, train_set, tokenizer, tmp_path):
    run_once(tmp_path, train_set, tokenizer, steps=2, evaluate_every=1)
    edit_config(tmp_path / "step-00000002", seal=True, **damage)
    with pytest.raises(ValueError, match="without all of what a training goes on from"):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            replace(SETTINGS, steps=2, evaluate_every=1),
            run=tmp_path,
            resume=True,
        )


@pytest.mark.parametrize("lost", ["optimizer/exp_avg/", "optimizer/step/"])
def test_moments_that_are_absent_or_of_another_shape(
    lost, train_set, tokenizer, tmp_path, monkeypatch
):
    run_once(tmp_path, train_set, tokenizer)
    real = checkpoint.load_training

    def without(found):
        tensors = real(found)
        name = next(name for name in tensors if name.startswith(lost))
        if "exp_avg" in name:
            tensors[name] = tensors[name].new_zeros(1, 1, 1)
        else:
            del tensors[name]
        return tensors

    monkeypatch.setattr(checkpoint, "load_training", without)
    with pytest.raises(ValueError, match="without all of what a training goes on from"):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            SETTINGS,
            run=tmp_path,
            resume=True,
        )
