"""Trainings that are killed, and trainings of more than one process."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mbm_kernels.captioning import checkpoint, options, processes
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit
from tests import children

from .forked import GROUP
from .training_helpers import assert_same, colours, make, weights_of

FORKED = ("-m", "tests.captioning.forked")


def forked(*arguments):
    done = children.python(*FORKED, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_random_moments_and_resumed(tmp_path):
    """`python -m tests.captioning.forked crash FOLDER` does it 20 times."""
    output = forked("crash", tmp_path, 3, 1)
    assert "3 kills in" in output
    assert "the same weights" in output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    forked("group", folder)
    return folder


def history(run):
    return checkpoint.load(run, layers="stock", which="latest").config["history"]


@pytest.mark.parametrize(
    ("objective", "parallel"), [("hard", "ddp"), ("hard", "fsdp2"), ("distill", "ddp")]
)
def test_two_processes_are_one(objective, parallel, runs):
    one, two, parts = (runs / f"{objective}-{name}" for name in ("one", parallel, "parts"))
    for group, rows in history(one).items():
        for ours, theirs in zip(history(two)[group], rows, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), group
    found, expected = weights_of(two), weights_of(parts)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)


def test_a_process_that_dies_leaves_a_checkpoint_to_go_on_from(runs):
    """`forked.groups` has seen the run end at once, its checkpoint of step 3 whole."""
    assert_same(weights_of(runs / "dead-fsdp2"), weights_of(runs / "hard-fsdp2"))


def test_a_batch_of_fewer_rows_than_parts_is_refused(monkeypatch):
    train_set = colours()
    tokenizer = WordTokenizer.train(train_set.captions)
    monkeypatch.setattr(processes, "world", lambda: 7)
    with pytest.raises(ValueError, match="batch_size: got 6, expected at least 7, a row for each"):
        fit(CrossEntropyObjective(make(tokenizer)), train_set, tokenizer, GROUP)


def test_resume_begins_anew_only_where_torchrun_restarts(tmp_path, monkeypatch):
    given = options.TrainingOptions(out=tmp_path, resume=True)
    assert given.fitting()["resume"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert given.fitting()["resume"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert not given.fitting()["resume"]
    (tmp_path / "checkpoints.json").write_text("{}")
    assert given.fitting()["resume"]


def workers(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(x) for x in found]


@pytest.mark.slow
def test_torchrun_goes_on_after_a_worker_was_killed(tmp_path):
    def start(run):
        train = ("caption", "train", "--layers=stock", "--size=student", "--limit=16", "--resume")
        train += ("--batch-size=8", "--image-size=16", "--evaluate-every=2", "--steps=24", "--out")
        return children.Child(*FORKED, "elastic", *train, run)

    whole = start(tmp_path / "whole").end()
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "killed"
    killed = start(run)
    while not checkpoint.exists(run):
        assert killed.is_alive(), killed.end().stderr
        time.sleep(0.01)
    os.kill(workers(killed.pid)[-1], signal.SIGKILL)
    done = killed.end()
    assert done.returncode == 0, done.stderr
    # Which of the two is said to have failed is a race: the other may lose its connection first.
    assert "restarts: 1" in done.stdout
    assert "restarts: 1" not in whole.stdout
    assert done.stdout.count("step 24, loss") == whole.stdout.count("step 24, loss") == 1
    assert_same(weights_of(run), weights_of(tmp_path / "whole"))
