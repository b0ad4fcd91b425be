"""A run's folder is one process's at a time, and is left as it was found."""

import errno
import fcntl
import os
import signal
import threading

import pytest

from mbm_kernels.captioning.distill import CrossEntropyObjective
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.lock import LOCK, locked
from mbm_kernels.demo import run as run_demo
from tests import children

from .training_helpers import (  # noqa: F401  the fixtures are used by name
    SETTINGS,
    Stop,
    make,
    run_once,
    stop_at,
    tokenizer,
    train_set,
)

HOLD = """
import sys, time
from pathlib import Path
from mbm_kernels.captioning.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder `run`."""
    child = children.Child("-c", HOLD, tmp_path / "run", tmp_path / "enough")
    child.wait_for("held\n")
    yield child
    child.end(0)


def test_a_second_training_is_refused_and_a_third_after_it_runs(
    other, train_set, tokenizer, tmp_path
):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match=f"run {run}: got a folder that process {other.pid} "):
        run_once(run, train_set, tokenizer)
    assert [path.name for path in run.iterdir()] == [LOCK], "the holder's file is untouched"
    (tmp_path / "enough").touch()
    other.end()
    assert not run.exists(), "its holder made the folder and left nothing in it"
    run_once(run, train_set, tokenizer)
    assert not (run / LOCK).exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(how, other, tmp_path):
    run = tmp_path / "run"
    other.signal(how)
    other.end()
    assert (run / LOCK).read_text() == f"process {other.pid}\n"
    with locked(run):
        assert (run / LOCK).read_text() == f"process {os.getpid()}\n"
    assert list(run.iterdir()) == []


def test_threads_exclude_each_other_too(tmp_path):
    refused = []

    def second():
        try:
            with locked(tmp_path):
                pass
        except RuntimeError as error:
            refused.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    with locked(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_before_it_was_taken(tmp_path, monkeypatch):
    """Its holder unlinks it between another's open and flock: a lock on no name excludes nobody."""
    real, calls = fcntl.flock, []

    def flock(handle, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert len(calls) == 2


def test_it_is_released_when_training_fails(train_set, tokenizer, tmp_path):
    def stop():
        raise Stop

    run = tmp_path / "deep" / "run"
    for _ in range(2):
        with pytest.raises(Stop):
            fit(
                CrossEntropyObjective(make(tokenizer)),
                train_set,
                tokenizer,
                SETTINGS,
                run=run,
                after_step=stop_at(2, stop),
            )
        assert list(tmp_path.iterdir()) == [], "nothing was saved: no folder is left"


def test_a_folder_that_was_there_stays(tmp_path):
    with locked(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_what_was_half_written_is_removed(train_set, tokenizer, tmp_path):
    half = tmp_path / ".partial-abc"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    run_once(tmp_path, train_set, tokenizer)
    names = ["README.md", "checkpoints.json", "step-00000006"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("where", ["file", "below a file", "/proc", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    where, train_set, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("kept")
    run = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "/proc": os.path.join("/proc", "run"),
        "read-only": tmp_path / "run",
    }[where]
    if where == "read-only":  # to root, every folder can be written

        def read_only(*arguments):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "open", read_only)
    steps = []
    with pytest.raises(OSError, match=r"got a folder that cannot be written .*, expected one"):
        fit(
            CrossEntropyObjective(make(tokenizer)),
            train_set,
            tokenizer,
            SETTINGS,
            run=type(tmp_path)(run),
            after_step=steps.append,
        )
    assert steps == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="this file system has no locks"), locked(tmp_path):
        pass


def test_two_demos_into_one_folder(tmp_path):
    """The first thing that a demo does there is to remove the models of the one before."""
    with locked(tmp_path), pytest.raises(RuntimeError, match=r"demo .*: got a folder that process"):
        run_demo.run("scenes", out=tmp_path, limit=4, steps=1)
