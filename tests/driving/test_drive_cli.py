"""`mbm-kernels drive`: the commands, and the one line that each kind of bad input ends in."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from mbm_kernels.cli import main
from mbm_kernels.driving import cli
from mbm_kernels.driving.train import train_driver

from .helpers import SHORT, TINY, TOKENIZER, StraightRoad


@pytest.fixture
def straight(monkeypatch):
    """The straight road for the racetrack, and a tiny model."""
    monkeypatch.setattr(cli, "Racetrack", StraightRoad)
    monkeypatch.setattr(cli, "CONFIG", TINY)
    monkeypatch.setattr(cli, "validation_seeds", lambda: range(1000, 1001))


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.exception
    return result


def test_train_and_eval(straight, tmp_path):
    fast = ("--steps", 2, "--batch-size", 8, "--episodes", 1, "--layers", "stock")
    out = call("train", "--out", tmp_path / "run", *fast)
    assert "step 2, loss " in out.stdout
    assert "recording 1 drives of the expert" in out.stderr
    short = ("--seeds", 2, "--seconds", 1, "--layers", "stock")
    table = json.loads(call("eval", tmp_path / "run", *short, "--json").stdout)
    assert len(table) == 10
    assert len(table["expert"]["by_episode"]) == 2
    assert 0 < table["expert"]["in_lane"] <= 1


BAD = {
    "no episodes": (("train", "--out", "new", "--episodes", "0"), "episodes: got 0, expected 1"),
    "too many": (("train", "--out", "new", "--episodes", "1001"), "episodes: got 1001, expected"),
    "noise": (("train", "--out", "new", "--noise", "2"), "noise: got 2, expected 0 to 1"),
    "no noise": (("train", "--out", "new", "--noise", "nan"), "noise: got nan, expected 0 to 1"),
    "no steps": (("train", "--out", "new", "--steps", "0"), "steps: got 0, expected"),
    "a run that is there": (("train", "--out", "run"), "got a folder with checkpoints, expected"),
    "no seeds": (("eval", "run", "--seeds", "0"), "seeds: got 0, expected 1 to 1000"),
    "no time": (("eval", "run", "--seconds", "0"), "seconds: got 0, expected 1 to 300"),
    "no run": (("eval", "absent"), "got no such folder, expected"),
    "no checkpoint": (("eval", "."), "got no config.json, expected"),
}


def end(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", "drive", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


class Forbidden:
    """A simulator that nobody may make."""

    def __init__(self):
        raise AssertionError


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_line_before_any_work(what, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "Racetrack", Forbidden)
    (tmp_path / "run").symlink_to(run)
    arguments, reason = BAD[what]
    code, errors = end(monkeypatch, capsys, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: .*\n", errors), errors
    assert reason in errors
    assert [x.name for x in tmp_path.iterdir()] == ["run"]


def test_a_driver_of_other_drives_is_refused(drives, tmp_path, monkeypatch, capsys):
    train_driver(
        drives, TOKENIZER, SHORT, config=TINY, layers="stock", run=tmp_path / "run", progress=False
    )
    code, errors = end(monkeypatch, capsys, "eval", str(tmp_path / "run"))
    assert code == 2
    assert re.fullmatch(r"error: .* got a driver without how its drives .*, expected .*\n", errors)


def test_without_highway_env_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "highway_env", None)
    code, errors = end(monkeypatch, capsys, "train", "--out", str(tmp_path / "new"))
    assert code == 2
    assert re.fullmatch(
        r"error: driving: got no highway-env .*, expected one; "
        r"`pip install 'mbm_kernels\[caption,driving\]'`\n",
        errors,
    )
    assert not list(tmp_path.iterdir())
