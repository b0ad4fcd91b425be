"""The options of a training: what each does, and that with all a resumed run has the same bits."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.batches import Batches
from mbm_kernels.captioning.cli import app
from mbm_kernels.captioning.distill import CrossEntropyObjective, DistillationObjective, hard_loss
from mbm_kernels.captioning.execution import Execution
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.presets import DistillSettings, TrainSettings
from mbm_kernels.captioning.seeding import seeded
from mbm_kernels.models import TwoTower, TwoTowerConfig
from mbm_kernels.retrieval.objective import ContrastiveObjective

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    SETTINGS,
    Stop,
    assert_same,
    make,
    run_once,
    stop_at,
    tokenizer,
    train_set,
    weights_of,
)

ALL = replace(SETTINGS, augment=True, accumulate=2, ema=0.9, patience=5, amp="bf16")
FAST = ("--layers", "stock", "--batch-size", "4", "--limit", "8", "--steps", "2")


def trained(train_set, tokenizer, settings, objective=None, **arguments):
    objective = objective or CrossEntropyObjective(make(tokenizer))
    history = fit(objective, train_set, tokenizer, settings, validation=train_set, **arguments)
    return objective, history


def test_resume_with_every_option_gives_the_same_bits(train_set, tokenizer, tmp_path):
    def stop():
        raise Stop

    whole, history = trained(train_set, tokenizer, ALL, run=tmp_path / "whole")
    with pytest.raises(Stop):
        trained(
            train_set, tokenizer, ALL, run=tmp_path / "cut", after_step=stop_at(5, stop)
        )  # after the checkpoint of step 3
    again, resumed = trained(train_set, tokenizer, ALL, run=tmp_path / "cut", resume=True)
    assert resumed == history
    assert_same(whole.state_dict(), again.state_dict())
    first, second = (
        checkpoint.load_training(checkpoint.load(tmp_path / name, layers="stock", which="latest"))
        for name in ("whole", "cut")
    )
    assert any(name.startswith("raw/") for name in first)
    assert_same(first, second)


def test_parts_of_a_batch_are_its_rows(train_set, tokenizer):
    """The same images, augmented alike, and the same words hidden as in the whole batch."""
    settings = replace(SETTINGS, augment=True, batch_size=7, word_dropout=0.5)

    def parts(count, wanted):
        batches = Batches(train_set, tokenizer, settings, 3, count)
        with seeded(3, 1):
            return list(batches.parts(1, wanted))

    (whole,) = parts(1, [0])
    three = parts(3, [0]) + parts(3, [1, 2])  # as two processes would have them
    torch.testing.assert_close(torch.cat([x.images for x in three]), whole.images)
    for name in ("rows", "inputs", "tokens"):
        assert torch.equal(torch.cat([getattr(x, name) for x in three]), getattr(whole, name))
    assert sum(x.share.rows for x in three) == pytest.approx(1)
    assert sum(x.share.words for x in three) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cross-entropy", "distillation"])
def test_accumulation_gives_the_gradients_of_the_whole_batch(kind, train_set, tokenizer):
    # Captions of different lengths, so that parts differ in their number of words.
    train_set.captions[:4] = ["red", "a very dark green square", "a blue", "bright"]

    def objective():
        if kind == "cross-entropy":
            return CrossEntropyObjective(make(tokenizer))
        torch.manual_seed(0)
        return DistillationObjective(make(tokenizer), make(tokenizer, 2), DistillSettings())

    settings = replace(SETTINGS, batch_size=7, clip=1e9)
    runs = [
        trained(train_set, tokenizer, replace(settings, accumulate=parts), objective())
        for parts in (1, 3)
    ]
    (whole, history), (parts, same) = runs
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(same.train, history.train, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_losses_that_relate_rows_are_not_computed_in_parts(train_set, tokenizer):
    config = TwoTowerConfig(image_size=16, channels=(8, 8, 8), features=8, embedding=8, hidden=8)
    objective = ContrastiveObjective(TwoTower(tokenizer.vocab_size, config=config, layers="stock"))
    settings = replace(SETTINGS, accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate: got 2 parts .* `retrieve train` relates"):
        fit(objective, train_set, tokenizer, settings)


def test_the_average_of_the_weights_is_evaluated_and_saved(train_set, tokenizer, tmp_path):
    settings = replace(SETTINGS, ema=0.5, steps=4, evaluate_every=1)
    expected, raw = {}, CrossEntropyObjective(make(tokenizer))
    states = []
    fit(
        raw,
        train_set,
        tokenizer,
        replace(settings, ema=None),
        after_step=lambda step: states.append([x.detach().clone() for x in raw.parameters()]),
    )
    average = [x.detach().clone() for x in make(tokenizer).parameters()]
    for n, state in enumerate(states, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * x for a, x in zip(average, state, strict=True)]
    expected = dict(zip(dict(raw.model.named_parameters()), average, strict=True))
    objective, history = trained(train_set, tokenizer, settings, run=tmp_path)
    for found in (dict(objective.model.named_parameters()), weights_of(tmp_path)):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-6)
    saved = checkpoint.load(tmp_path, layers="stock", which="latest").model
    loss = hard_loss(saved, train_set, tokenizer, 12)
    assert history.validation[-1]["loss"] == pytest.approx(loss)


def test_it_stops_early_and_stays_stopped(train_set, tokenizer, tmp_path):
    # The rate makes every validation after the first ones worse.
    settings = replace(
        SETTINGS, steps=60, evaluate_every=1, learning_rate=3.0, warmup=50, clip=1e9, patience=3
    )
    objective, history = trained(train_set, tokenizer, settings, run=tmp_path)
    losses = [row["loss"] for row in history.validation]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 3 < 60
    assert history.train[-1]["step"] == len(losses)
    steps = {
        which: checkpoint.load(tmp_path, layers="stock", which=which).config["step"]
        for which in ("best", "latest")
    }
    assert steps == {"best": best, "latest": best + 3}
    taken = []
    again, same = trained(
        train_set, tokenizer, settings, run=tmp_path, resume=True, after_step=taken.append
    )
    assert taken == []
    assert same == history
    assert_same(objective.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="patience: got 3 without images to validate on"):
        run_once(None, train_set, tokenizer, patience=3)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(train_set, tokenizer):
    (_, plain), (half, history) = (
        trained(train_set, tokenizer, replace(SETTINGS, amp=amp)) for amp in (None, "bf16")
    )
    assert {x.dtype for x in half.parameters()} == {torch.float32}
    ours, theirs = history.train[-1]["loss"], plain.train[-1]["loss"]
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=2**-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 0},
        {"patience": 0},
        {"ema": 1.0},
        {"amp": "fp16"},
        {"word_dropout": 1.5},
        {"weight_decay": -1.0},
    ],
    ids=str,
)
def test_impossible_settings(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: got .*, expected"):
        TrainSettings(steps=1, **changes)


def test_what_a_resumed_run_differs_in_is_named(train_set, tokenizer, tmp_path):
    run_once(tmp_path, train_set, tokenizer)
    with pytest.raises(ValueError, match=r"with ema None, seed 0, expected ema 0\.5, seed 1;"):
        trained(train_set, tokenizer, replace(SETTINGS, ema=0.5), run=tmp_path, resume=True, seed=1)


class Writer:
    """Stands in for torch's SummaryWriter."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.rows.append((name, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_each_row_once(train_set, tokenizer, tmp_path, monkeypatch):
    Writer.made.clear()
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    execution = Execution(tensorboard=True)

    def stop():
        raise Stop

    with pytest.raises(Stop):
        trained(
            train_set,
            tokenizer,
            SETTINGS,
            run=tmp_path,
            execution=execution,
            after_step=stop_at(5, stop),
        )
    trained(train_set, tokenizer, SETTINGS, run=tmp_path, execution=execution, resume=True)
    first, second = Writer.made
    assert first.folder == str(tmp_path / "tensorboard")
    assert first.rows == [("validation/loss", 3)]
    assert second.purge_step == 4
    assert sorted(second.rows) == [("train/hard", 6), ("train/loss", 6), ("validation/loss", 6)]
    assert first.closed
    assert second.closed


def test_tensorboard_that_is_not_installed(train_set, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: got none .* `pip install tensorboard`"):
        trained(
            train_set,
            tokenizer,
            SETTINGS,
            run=tmp_path / "run",
            execution=Execution(tensorboard=True),
        )
    assert list(tmp_path.iterdir()) == []


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_options_from_a_file_and_flags_over_them(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'out = "{tmp_path / "run"}"\nlayers = "stock"\nlimit = 8\nsteps = 9\n'
        "batch-size = 4\nema = 0.9\naugment = true\nlearning_rate = 1e-3\n"
    )
    result = call("train", "--config", file, "--steps", 2, "--size", "student")
    assert result.exit_code == 0, result.exception
    saved = json.loads((tmp_path / "run" / "step-00000002" / "config.json").read_text())
    found = saved["training"]["settings"]
    assert saved["model"]["config"]["hidden"] == 192  # the student's
    expected = {"steps": 2, "batch_size": 4, "ema": 0.9, "augment": True, "learning_rate": 1e-3}
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("stepz = 3", "got the key 'stepz', expected one of accumulate, amp"),
        ("[train]\nsteps = 3", "got the key 'train'"),
        ("steps = [3]", "got steps = [3], expected text, a number"),
        ("steps = ", "got no TOML"),
        ('config = "other.toml"', "got the key 'config'"),
        (None, "got no file that can be read"),
    ],
)
def test_a_file_of_options_that_is_refused(text, error, tmp_path):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    result = call("train", "--out", tmp_path / "run", "--config", file, *FAST)
    assert error in str(result.exception)
    assert str(result.exception).startswith(f"config {file}: got ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["2.5", "true", '"many"'])
def test_a_value_of_another_type_in_the_file(value, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f"steps = {value}")
    result = call("train", "--out", tmp_path / "run", "--config", file)
    assert result.exit_code == 2
    assert "Invalid value for '--steps'" in result.output
