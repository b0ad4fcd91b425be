"""`make gpu-check`: the CUDA tests of every operation, then its benchmarks, on the GPU at hand.

OPS=gru,captioner,... narrows operations and models, STAGE=tests|bench|all the work, MINUTES the
time in all (9), the build included. "all" tests first, then measures in bfloat16 the cases that
goals are set for; "bench" takes every GPU case, and float32 too. What the time did not reach is
listed. Results go to $OUT where set, row by row.

Tests run in several processes at once, as what takes their time is compiling on the host; what is
timed has the machine to itself.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import cli, machine, results
from mbm_kernels.bench.benchmark import Benchmark
from mbm_kernels.bench.gpu_child import Task
from mbm_kernels.bench.gpu_processes import Clock, Failure, measure, run_all

STAGES = ("tests", "bench", "all")
GOALS = (  # what the time is for, should it not suffice for all
    *("additive_attention", "gru", "conv_bias_act", "cross_attention"),
    *("linear_distillation_loss", "decode_step", "captioner"),
)
GPU_BACKENDS = ("triton", "cuda")
TESTS_SHARE = 0.5  # of the time, when both stages run
MINUTES = 9.0
# Test processes: some 1600 kernels are compiled, 0.5 to 1 s each.
WORKERS = 12
# cuBLAS warns of its workspace wherever the tests poison memory.
TEST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
CONV = "tests/test_conv_bias_act_triton.py"
MORE_TESTS = {
    "captioner": (["tests/gpu/test_decode_graph.py"],),
    "linear_topk": (["tests/test_linear_topk_beams.py"],),
    "conv_bias_act": ([CONV, "-k", "test_every_way"], [CONV, "-k", "not test_every_way"]),
}


def main() -> int:
    stage = os.environ.get("STAGE") or "all"
    if stage not in STAGES:
        raise ValueError(f"STAGE: got {stage!r}; expected one of {', '.join(STAGES)}; fix it")
    root = Path.cwd()
    benchmarks = cli.load(root / "benchmarks")
    known = [*OPS, *(b.op for b in benchmarks if b.op not in OPS)]
    names = [name for name in os.environ.get("OPS", "").split(",") if name] or known
    for name in names:
        if name not in known:
            raise ValueError(f"OPS: got {name!r}; expected one of {', '.join(known)}; fix the name")
    minutes = _minutes(os.environ.get("MINUTES"))
    if not torch.cuda.is_available():
        raise ValueError(
            "gpu-check: torch sees no CUDA device; expected one; run it on a machine with a GPU"
        )
    clock = Clock(minutes)
    failures = build(root, clock)
    if stage != "bench":
        share = 1.0 if stage == "tests" else TESTS_SHARE
        failures += run_tests(names, root, Clock(share * clock.left() / 60))
    lines: list[str] = []
    if stage != "tests":
        chosen = [b for b in benchmarks if b.op in names]
        lines, wrong = run_benchmarks(chosen, root, clock, whole=stage == "bench")
        failures += wrong
    print("\n".join(["", *lines, ""]))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"gpu-check: {len(failures)} failures, {clock.spent():.0f} s")
    return 1 if failures else 0


def _minutes(given: str | None) -> float:
    try:
        return float(given or MINUTES)
    except ValueError:
        raise ValueError(f"MINUTES: got {given!r}; expected a number; fix it") from None


def build(root: Path, clock: Clock) -> list[str]:
    """The kernels for CPUs are beside the point of a GPU: without them the rest goes on."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=root, timeout=clock.left() / 2)
    except subprocess.TimeoutExpired:
        return ["build: cut off by the time"]
    return ["build: see above"] if done.returncode else []


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """Named pytest commands of an operation, its longest parts apart, or of a model."""
    for i, command in enumerate(MORE_TESTS.get(name, ()), 1):
        yield f"{name} more tests {i}", list(command)
    backends = [b for b in GPU_BACKENDS if name in OPS and dispatch.why_not(name, b) is None]
    if not backends:
        return
    mine, file = " or ".join(backends), f"tests/test_{name}.py"
    yield f"{name} backward", [file, "-k", f"({mine}) and test_backward"]
    yield f"{name} forward", [file, "-k", f"({mine}) and test_forward"]
    rest = f"({mine}) and not test_forward and not test_backward"
    yield f"{name} other tests", [file, "-k", rest]
    by_id = " or ".join(f"{name}-{backend}" for backend in backends)
    yield f"{name} on hardware", ["tests/gpu", "-k", f"{by_id} or test_{name}_"]


def run_tests(names: Sequence[str], root: Path, clock: Clock) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-o", "faulthandler_timeout=60"]  # names the test that hangs
    given = dict(command for name in names for command in commands(name))
    for name in names:
        if not any(True for _ in commands(name)):
            print(f"{name}: no test on a GPU", flush=True)
    wanted = {what: [*pytest, *arguments] for what, arguments in given.items()}
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) * 3 // 4))
    failures = []
    for done in run_all(wanted, root, clock, workers, TEST_ENVIRONMENT):
        last = (done.output.strip().splitlines() or ["no output"])[-1]
        if done.code == 0:
            print(f"{done.name}: {last} [{done.seconds:.0f} s]", flush=True)
            continue
        how = "cut off by the time" if done.code is None else f"status {done.code}"
        print(f"{done.name}: {how}\n{done.output}", flush=True)
        failures.append(f"{done.name}: {how}; pytest {' '.join(given[done.name])}")
    return failures


def run_benchmarks(
    benchmarks: Sequence[Benchmark], root: Path, clock: Clock, *, whole: bool
) -> tuple[list[str], list[str]]:
    """The table's lines, and what was wrong, failed or was not reached."""
    dirty = machine.is_dirty(root)
    file = results.ResultsFile(
        root / "benchmarks" / "results",
        machine.commit(root),
        device=machine.gpu(),
        local=results.is_local(dirty, compiled=True),
    )
    lines, failures = [HEADER], []
    print(HEADER, flush=True)
    for found in measure(tasks(benchmarks, whole=whole), root, clock):
        if isinstance(found, Failure):
            failures.append(f"{found.task}: {found.reason}")
            print(failures[-1], flush=True)
            continue
        file.append(found | {"dirty": dirty})
        lines.append(line(found))
        print(lines[-1], flush=True)
        if reason := found.get("wrong") or found.get("failed"):
            what = f"{found['op']} {found['case']}, {found['pass']}, {found['dtype']}"
            failures.append(f"{what}: {reason}")
    lines.append(f"written: {file.path}")
    return lines, failures


def tasks(benchmarks: Sequence[Benchmark], *, whole: bool) -> list[Task]:
    """Those with goals first, and of these the models last: compiling them takes the longest."""
    dtypes = ("bfloat16", "float32") if whole else ("bfloat16",)
    return [
        Task(benchmark.op, case.label, which, dtype, backend)
        for benchmark in sorted(benchmarks, key=lambda b: (b.op not in GOALS, b.op not in OPS))
        for backend in gpu_backends(benchmark.op)
        for case in benchmark.gpu_cases
        if whole or case.quick
        for which in case.passes
        for dtype in dtypes
    ]


def gpu_backends(op: str) -> list[str]:
    """Those that run here, of a model any that one of its operations may take."""
    asked = [op] if op in OPS else list(OPS)
    return [b for b in GPU_BACKENDS if any(dispatch.why_not(name, b) is None for name in asked)]


WIDTH = 98
HEADER = (
    f"{'operation, case, pass, dtype, L2':<{WIDTH}} {'backend':<8} {'mbm ms':>8} {'stock ms':>8}"
    f" {'ratio':>6}  {'called':>6}  {'limit':>5}  best stock form"
)


def line(row: results.Row) -> str:
    what = f"{row['op']} {row['case']}, {row['pass']}, {row['dtype']}, {row.get('l2', '-')}"
    if "mbm_ms" not in row:
        return f"{what:<{WIDTH}} {'WRONG' if 'wrong' in row else 'FAILED'}"
    share = f"{row['limit']['share']:.0%}" if "limit" in row else "-"
    return (
        f"{what:<{WIDTH}} {row['backend']:<8} {row['mbm_ms']:8.4f} {row['stock_ms']:8.4f}"
        f" {row['ratio']:6.2f}  {row['ratio_called']:6.2f}  {share:>5}  {row['stock_form']}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
