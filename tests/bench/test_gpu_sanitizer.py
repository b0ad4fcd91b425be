"""compute-sanitizer as a part of make gpu-check, by a tool that pretends."""

import sys
import textwrap
from pathlib import Path

import pytest

from mbm_kernels._core import cuda_launch, dispatch
from mbm_kernels.bench import cli
from mbm_kernels.bench.gpu import check, goals, sanitizer, worker
from mbm_kernels.bench.gpu.processes import Clock

BENCHMARKS = cli.load(Path(__file__).resolve().parents[2] / "benchmarks")
# In place of compute-sanitizer: it writes a report and runs no worker.
SANITIZER = """
    import json, pathlib, sys
    tool, path = sys.argv[2], pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1])
    (task,) = json.load(sys.stdin)
    print(json.dumps({"started": task}), flush=True)
    if task[0] == "gru_cell" and tool == "memcheck":
        sys.exit(7)
    kind, count = ("RACECHECK", 0) if tool == "racecheck" else ("ERROR", 0)
    if task[0] == "gru" and tool == "racecheck":
        count = 2
    if (task[0], tool) != ("gru", "synccheck"):
        path.write_text(f"===== COMPUTE-SANITIZER\\n===== {kind} SUMMARY: {count} errors\\n")
    print(json.dumps({"row": {"op": task[0]}}), flush=True)
    print(json.dumps({"done": task}), flush=True)
"""


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(
        dispatch, "why_not", lambda op, name: None if "cuda" in dispatch._tables[op].backends
        and name == "cuda" else "no",
    )  # fmt: skip


def test_the_sanitizer_looks_at_each_cuda_kernel(with_cuda, tmp_path, monkeypatch):
    out, script = tmp_path / "out", tmp_path / "compute-sanitizer"
    script.write_text(f"#!{sys.executable}\n" + textwrap.dedent(SANITIZER))
    script.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda: str(script))
    monkeypatch.setenv("OUT", str(out))
    log = check.Log("tests")
    ops = [task.op for task in goals.cuda_tasks(BENCHMARKS)]
    assert set(ops) >= {"additive_attention", "additive_attention_keys", "gru", "gru_cell"}
    failures = sanitizer.run(BENCHMARKS, tmp_path, Clock(1), log, 2)
    assert [failure.split(",")[0].split(" ")[1] for failure in failures] == [
        "gru_cell",
        "gru",
        "gru",
    ]
    assert "status 7" in failures[0]
    assert "2 errors; see sanitizer.txt" in failures[1]
    assert "no summary" in failures[2]
    report = (out / "sanitizer.txt").read_text()
    assert report.count("SUMMARY: ") == len(sanitizer.TOOLS) * len(ops) - 2
    assert "memcheck: additive_attention_keys" in report
    assert "nothing found" in (out / "gpu-check-tests.log").read_text()
    failures = sanitizer.run(BENCHMARKS, tmp_path, Clock(0), log, 2)
    assert all("not reached in the time" in failure for failure in failures)


def test_without_a_sanitizer_it_is_left_out_with_a_reason(with_cuda, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert sanitizer.run(BENCHMARKS, tmp_path, Clock(1), check.Log("tests"), 1) == []
    assert sanitizer.run([], tmp_path, Clock(1), check.Log("tests"), 1) == []
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "compute-sanitizer: left out: it is not installed; it comes with the CUDA toolkit",
        "compute-sanitizer: left out: no CUDA C++ kernel runs here",
    ]


def test_a_sanitizer_is_given_one_tiny_call():
    """What the worker then does, by the emulated kernels."""
    pytest.importorskip("mbm_kernels._C_cuda_emulated")
    with cuda_launch.emulated():
        tasks = goals.cuda_tasks(BENCHMARKS)
        assert tasks
        for given in tasks:
            benchmark = next(b for b in BENCHMARKS if b.op == given.op)
            (case,) = (c for c in benchmark.gpu_cases if c.label == given.case)
            assert list(worker.WORK["once"](benchmark, case, given))
