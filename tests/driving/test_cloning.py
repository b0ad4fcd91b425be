"""The clone: trained by the shared loop, driven in closed loop, without each of its streams."""

from dataclasses import replace

import pytest
import torch

from mbm_kernels.captioning import checkpoint
from mbm_kernels.captioning.kinds import DRIVER, MULTIMODAL
from mbm_kernels.driving.evaluate import as_text, evaluate
from mbm_kernels.driving.train import train_driver
from tests.captioning.training_helpers import Stop, assert_same, stop_at

from .helpers import SHORT, TINY, TOKENIZER, StraightRoad


def fitted(drives, settings=SHORT, **arguments):
    arguments = {"config": TINY, "layers": "stock", "progress": False, **arguments}
    return train_driver(drives, TOKENIZER, settings, **arguments)


def test_it_drives_by_what_it_was_told_and_sees(run, drives):
    found = checkpoint.load(run, layers="stock", kind=DRIVER)
    scores = evaluate(
        found.model, found.tokenizer, drives, drives, StraightRoad, seeds=4, seconds=6
    )
    assert list(scores) == [
        "expert",
        "model, all streams",
        "model without image",
        "model without words",
        "model without color",
        "model without time",
        "model, image alone",
        "linear, 8x8 pixels, each lane",
        "linear, 8x8 pixels",
        "constant steering",
    ]
    lane = {name: sum(score.in_lane) / 4 for name, score in scores.items()}
    assert lane["expert"] > 4.5
    assert lane["model, all streams"] > 0.85 * lane["expert"]
    for name in ("model without image", "model without words"):
        assert lane[name] < 0.8 * lane["model, all streams"], name
    assert scores["model, all streams"].error < 0.5 * scores["constant steering"].error
    assert scores["expert"].error is None
    lines = as_text(scores).splitlines()
    assert len(lines) == 1 + len(scores)
    assert len({len(line) for line in lines[2:]}) == 1
    table = scores["constant steering"].as_dict()
    assert table["episodes"] == len(table["by_episode"]) == 4


def test_both_layers_read_the_run_and_no_other_command_does(run, drives):
    seen = [checkpoint.load(run, layers=layers, kind=DRIVER) for layers in ("mbm", "stock")]
    assert_same(*(found.model.state_dict() for found in seen))
    with pytest.raises(ValueError, match=r"'mbm_kernels.driver'.*`mbm-kernels retrieve match`"):
        checkpoint.load(run, layers="stock", kind=MULTIMODAL)
    assert "mbm-kernels drive eval" in (run / "README.md").read_text()


def test_resume_gives_the_same_bits_and_other_drives_are_refused(drives, tmp_path, monkeypatch):
    from mbm_kernels.driving import train

    whole, history = fitted(drives, validation=drives, run=tmp_path / "whole")

    def stopped(*arguments, **options):
        def stop():
            raise Stop

        return fit(*arguments, **options, after_step=stop_at(3, stop))

    fit = train.fit
    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(Stop):
        fitted(drives, validation=drives, run=tmp_path / "cut")
    monkeypatch.setattr(train, "fit", fit)
    resume = {"validation": drives, "run": tmp_path / "cut", "resume": True}
    resumed, again = fitted(drives, **resume)
    assert_same(whole.state_dict(), resumed.state_dict())
    assert again == history
    with pytest.raises(ValueError, match=r"got a checkpoint with data '.*; resume with the"):
        fitted(replace(drives, checksum="other"), **resume)
    with pytest.raises(ValueError, match=r"noise None, expected noise 0.5"):
        fitted(drives, made_by={"noise": 0.5}, **resume)


def test_a_step_in_parts_is_the_same_step(drives):
    whole, history = fitted(drives)
    parts, in_parts = fitted(drives, replace(SHORT, accumulate=3))
    assert in_parts.train[-1]["loss"] == pytest.approx(history.train[-1]["loss"], rel=1e-4)
    for name, x in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], x, atol=1e-4, rtol=1e-3)


def test_a_model_of_fewer_streams_drives(drives):
    config = replace(TINY, streams=("image", "words"))
    model, _ = fitted(drives, config=config)
    scores = evaluate(model, TOKENIZER, drives, drives, StraightRoad, seeds=1, seconds=1)
    models = [name for name in scores if name.startswith("model")]
    assert models == ["model without color, time", "model, words alone", "model, image alone"]


def test_frames_must_not_be_moved(drives):
    with pytest.raises(ValueError, match="augment: got True, expected False"):
        fitted(drives, replace(SHORT, augment=True))
