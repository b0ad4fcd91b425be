"""`mbm-kernels info` and how the command line ends."""

import json
import sys

import pytest

import mbm_kernels
from mbm_kernels.cli import app, main
from tests import children


def run(*args, **environment):
    return children.python("-m", "mbm_kernels", *args, **environment)


def test_info_json():
    done = run("info", "--json", MBM_ISA="baseline", MBM_TYPO="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["ops"]) == set(mbm_kernels.ops.PUBLIC)
    assert report["ops"]["additive_attention"]["cpu"] is None
    assert report["cpu"]["isa"] == "baseline"
    assert report["cpu"]["constants"] is None
    assert len(report["cpu"]["openmp_runtimes"]) == 1
    assert report["environment"]["MBM_ISA"] == "baseline"
    assert report["unknown_environment"] == ["MBM_TYPO"]
    assert report["gpu"]["name"] or report["gpu"]["why_not"]


def test_disabled_from_the_import_on():
    code = (
        "import torch, mbm_kernels; from mbm_kernels._core import dispatch\n"
        "with dispatch.watched() as seen:\n"
        "    mbm_kernels.nn.Conv2d(3, 4, 3, backend='cpu')(torch.ones(1, 3, 8, 8))\n"
        "    mbm_kernels.concat_linear([torch.ones(2, 3)], torch.ones(2, 3), backend='cpu')\n"
        "print(set(seen))"
    )
    for value, backend in (("1", "torch"), ("0", "cpu")):
        done = children.python("-c", code, MBM_DISABLE=value)
        assert done.stdout.strip() == str({backend}), done.stderr


def end(monkeypatch, capsys, *arguments):
    """Exit status and both outputs of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["mbm-kernels", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr()


def test_info_table(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    code, said = end(monkeypatch, capsys, "info")
    assert code == 0, said.err
    for word in ("OpenMP runtimes", "CPU kernels", "GPU", "additive_attention", "MBM_* in force"):
        assert word in said.out


def test_bad_input_ends_without_a_traceback(monkeypatch, capsys):
    done = run("info", MBM_ISA="sse9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: MBM_ISA: got 'sse9'; expected one of baseline")
    assert "Traceback" not in done.stderr
    code, said = end(monkeypatch, capsys, "no-such-command")
    assert code == 2
    assert "No such command" in said.err


def test_a_part_is_mounted_once(monkeypatch, capsys):
    for _ in range(2):
        assert end(monkeypatch, capsys, "gate", "--help")[0] == 0
    names = [group.name for group in app.registered_groups]
    assert names.count("gate") == 1
