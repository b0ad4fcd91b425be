"""`make gpu-check`: the CUDA tests of every operation, then its benchmarks, on the GPU at hand.

OPS=gru,... narrows the operations, STAGE=tests|bench|all the work, MINUTES the time in all (9).
"all" tests first, then measures in bfloat16 the cases that goals are set for; "bench" takes every
GPU case, and float32 too. What the time did not reach is listed. Results go to $OUT where set,
row by row.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import cli, gpu, machine, results

STAGES = ("tests", "bench", "all")
GPU_BACKENDS = ("triton", "cuda")
TESTS_SHARE = 0.5  # of the time, when both stages run
MINUTES = 9.0


class Clock:
    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def main() -> int:
    stage = os.environ.get("STAGE") or "all"
    if stage not in STAGES:
        raise ValueError(f"STAGE: got {stage!r}; expected one of {', '.join(STAGES)}; fix it")
    ops = [name for name in os.environ.get("OPS", "").split(",") if name] or list(OPS)
    for name in ops:
        dispatch.check_op(name)
    if not torch.cuda.is_available():
        raise ValueError(
            "gpu-check: torch sees no CUDA device; expected one; run it on a machine with a GPU"
        )
    minutes = float(os.environ.get("MINUTES") or MINUTES)
    root = Path.cwd()
    clock = Clock(minutes)
    failures: list[str] = []
    if stage != "bench":
        budget = Clock(minutes if stage == "tests" else TESTS_SHARE * minutes)
        failures += run_tests(ops, root, budget)
    lines: list[str] = []
    if stage != "tests":
        lines, wrong = run_benchmarks(ops, root, clock, whole=stage == "bench")
        failures += wrong
    print("\n".join(["", *lines, ""]))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"gpu-check: {len(failures)} failures, {60 * minutes - clock.left():.0f} s")
    return 1 if failures else 0


def run_tests(ops: Sequence[str], root: Path, clock: Clock) -> list[str]:
    """One pytest process for each operation with a GPU backend: a crash leaves the others."""
    failures = []
    for op in ops:
        names = [b for b in GPU_BACKENDS if dispatch.why_not(op, b) is None]
        if not names:
            print(f"{op}: no GPU backend to test", flush=True)
            continue
        if not clock.left():
            failures.append(f"{op}: tests not reached in the time")
            continue
        for what, arguments in (
            (f"tests/test_{op}.py", ["-k", " or ".join(names)]),
            ("tests/gpu", ["-k", op]),
        ):
            command = [sys.executable, "-m", "pytest", "-q", "--tb=short", what, *arguments]
            try:
                done = subprocess.run(command, cwd=root, timeout=max(clock.left(), 1.0))
            except subprocess.TimeoutExpired:
                failures.append(f"{op}: {what} cut off by the time")
                continue
            if done.returncode != 0:
                failures.append(f"{op}: {what} {' '.join(arguments)}")
    return failures


def run_benchmarks(
    ops: Sequence[str], root: Path, clock: Clock, *, whole: bool
) -> tuple[list[str], list[str]]:
    """The table's lines, and what was wrong, failed or was not reached."""
    file = results.ResultsFile(
        root / "benchmarks" / "results", machine.commit(root), device=machine.gpu()
    )
    dirty = machine.is_dirty(root)
    settings = gpu.GpuSettings(dtypes=("bfloat16", "float32") if whole else ("bfloat16",))
    lines, failures = [HEADER], []
    for benchmark in cli.load(root / "benchmarks"):
        if benchmark.op not in ops and benchmark.op in OPS:
            continue
        for backend in gpu_backends(benchmark.op):
            chosen = [c for c in benchmark.gpu_cases if whole or c.quick]
            for case in chosen:
                if not clock.left():
                    failures.append(f"{benchmark.op} {case.label}: not reached in the time")
                    continue
                one = gpu.GpuSettings(dtypes=settings.dtypes, backend=backend)
                for row in gpu.run(benchmark, [case], one):
                    file.append(row | {"dirty": dirty})
                    lines.append(line(row))
                    print(lines[-1], flush=True)
                    if reason := row.get("wrong") or row.get("failed"):
                        failures.append(f"{benchmark.op} {case.label} {row['pass']}: {reason}")
    lines.append(f"written: {file.path}")
    return lines, failures


def gpu_backends(op: str) -> list[str]:
    """Those that run here, of a model any that one of its operations may take."""
    asked = [op] if op in OPS else list(OPS)
    return [b for b in GPU_BACKENDS if any(dispatch.why_not(name, b) is None for name in asked)]


HEADER = (
    f"{'operation, case, pass, dtype, L2':<66} {'backend':<8} {'mbm ms':>8} {'stock ms':>8}"
    f" {'ratio':>6}  {'called':>6}  {'limit':>5}  best stock form"
)


def line(row: results.Row) -> str:
    what = f"{row['op']} {row['case']}, {row['pass']}, {row['dtype']}, {row.get('l2', '-')}"
    if "mbm_ms" not in row:
        return f"{what:<66} {'WRONG' if 'wrong' in row else 'FAILED'}"
    share = f"{row['limit']['share']:.0%}" if "limit" in row else "-"
    return (
        f"{what:<66} {row['backend']:<8} {row['mbm_ms']:8.4f} {row['stock_ms']:8.4f}"
        f" {row['ratio']:6.2f}  {row['ratio_called']:6.2f}  {share:>5}  {row['stock_form']}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
