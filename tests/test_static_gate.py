"""The compile-time gate: what it records, what it lets pass, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mbm_kernels._core import dispatch, triton_launch
from mbm_kernels.bench import gate, static, static_cases

ROOT = Path(__file__).resolve().parent.parent
ENTRY = dataclasses.asdict(
    static.Resources(
        registers=64,
        stack=0,
        spill_stores=0,
        spill_loads=0,
        local_instructions=0,
        shared=1024,
        matrix_instructions=8,
        instructions=1000,
        occupancy=0.5,
    )
)


def moved(**changes):
    (move,) = gate.compare({"k": ENTRY}, {"k": {**ENTRY, **changes}}, whole=True)
    return move


def test_every_change_is_told():
    assert gate.compare({"k": ENTRY}, {"k": dict(ENTRY)}, whole=True) == []
    assert moved(registers=65).verdict == "WORSE"
    assert moved(registers=60).verdict == "BETTER"
    assert moved(occupancy=0.25).verdict == "WORSE"
    assert moved(matrix_instructions=16).verdict == "BETTER"
    assert moved(registers=60, instructions=1001).verdict == "WORSE"
    (new,) = gate.compare({}, {"k": ENTRY}, whole=True)
    (gone,) = gate.compare({"k": ENTRY}, {}, whole=True)
    assert (new.verdict, gone.verdict) == ("NEW", "GONE")
    assert gate.compare({"k": ENTRY}, {}, whole=False) == []


def test_a_reason_is_asked_for_spills_and_large_losses(tmp_path):
    path, versions = tmp_path / "op.json", {"triton": "1", "ptxas": "2"}
    gate.update(
        path,
        gate.read_baseline(path),
        {"k": ENTRY},
        gate.compare({}, {"k": ENTRY}, whole=True),
        versions,
        None,
    )
    stored = path.read_text()
    assert json.loads(stored) == {"versions": versions, "kernels": {"k": ENTRY}}
    for changes in ({"spill_stores": 4}, {"local_instructions": 1}, {"instructions": 1051}):
        now = {"k": {**ENTRY, **changes}}
        moves = gate.compare({"k": ENTRY}, now, whole=True)
        with pytest.raises(ValueError, match="expected a reason"):
            gate.update(path, gate.read_baseline(path), now, moves, versions, None)
        assert path.read_text() == stored
        gate.update(path, gate.read_baseline(path), now, moves, versions, "a wider tile")
        assert json.loads(path.read_text())["kernels"]["k"] == {
            **now["k"],
            "because": "a wider tile",
        }
        path.write_text(stored)
    now = {"k": {**ENTRY, "instructions": 1049}}
    gate.update(
        path,
        gate.read_baseline(path),
        now,
        gate.compare({"k": ENTRY}, now, whole=True),
        versions,
        None,
    )
    assert json.loads(path.read_text())["kernels"] == now


def test_a_new_kernel_that_spills_needs_a_reason():
    for name in ("spill_stores", "spill_loads", "local_instructions"):
        (move,) = gate.compare({}, {"k": {**ENTRY, name: 1}}, whole=False)
        assert move.needs_reason, name


def test_versions_are_compared(tmp_path):
    baseline = {"versions": {"triton": "1"}, "kernels": {"k": ENTRY}}
    with pytest.raises(ValueError, match="expected those of the baseline"):
        gate.check_versions(baseline, {"triton": "2"}, tmp_path)


@pytest.mark.parametrize("case", static_cases.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_cases_record_without_running(case):
    launches = case.record(torch.bfloat16)
    assert launches
    assert not triton_launch.recording()
    for launch in launches:
        assert all(n > 0 for n in launch.grid)


def test_every_triton_backend_is_gated_and_does_not_spill():
    """By the recorded baseline: no configuration spills on sm_90 without its reason."""
    for op in dispatch._tables:
        if "triton" not in dispatch._tables[op].backends:
            continue
        recorded = json.loads((ROOT / "benchmarks" / "static" / f"{op}.json").read_text())[
            "kernels"
        ]
        names = {key.partition(" | ")[0] for key in recorded}
        assert names == set(triton_launch.read_configs(op)), op
        for key, entry in recorded.items():
            if key.endswith("sm_90"):
                spills = [entry[n] for n in ("stack", "spill_stores", "spill_loads")]
                assert not any(spills) or entry.get("because"), f"{op}: {key}"


@pytest.mark.slow
def test_two_runs_agree_to_the_byte(tmp_path):
    """Through the command, in a process without the interpreter that the tests run under."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mbm_kernels", "gate", "static", "--op", "additive_attention"]
    texts = []
    for run in ("first", "second"):
        folder = tmp_path / run
        options = ["--folder", str(folder), "--cache", str(folder / "cache"), "--update"]
        environment = {**variables, "TRITON_CACHE_DIR": str(folder / "triton")}
        subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, check=True, capture_output=True
        )
        texts.append((folder / "additive_attention.json").read_text())
    assert texts[0] == texts[1]
    kernels = json.loads(texts[0])["kernels"]
    kernel = next(iter(kernels.values()))
    assert kernel["registers"] > 0
    assert kernel["instructions"] > 0
    done = subprocess.run(
        [
            *command,
            "--folder",
            str(tmp_path / "none"),
            "--cache",
            str(tmp_path / "first" / "cache"),
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "NEW" in done.stdout
