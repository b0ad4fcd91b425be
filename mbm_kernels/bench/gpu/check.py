"""`make gpu-check`: what a GPU at hand for a few minutes is to show, in stages of their own.

    python3 -m mbm_kernels.bench.gpu.check [--stage smoke|tests|goals|bench|all]
        [--ops gru,captioner] [--minutes 9] [--out FOLDER]

smoke    one tiny call of every operation's GPU kernels, each in a process of its own, right or not
tests    compute-sanitizer on the smallest call of each CUDA C++ kernel, where it is installed, and
         the CUDA tests of every operation
goals    benchmark rows of the cases that goals are set for, in bfloat16, most valuable first
bench    every GPU case, float32 too
all      smoke, tests and goals, which share the time

An option that is not given is read from the environment: STAGE, OPS, MINUTES, OUT. What the time
did not reach is listed. With OUT everything is written there as it comes: what is printed
(gpu-check-<stage>.log), each smoke test (smoke.json), what the sanitizer reports (sanitizer.txt),
each row (<date>-<commit>.json).

Tests and smoke run in several processes at once, as what takes their time is compiling on the host.
Before anything is timed, several processes call every form of the rows to come, which fills the
caches of Inductor and Triton on disk; what is timed then has the machine to itself.
Exit status: mbm_kernels/bench/exits.py; 1 where anything failed or was not reached.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import cli, exits, machine, results
from mbm_kernels.bench.benchmark import Benchmark
from mbm_kernels.bench.gpu import goals, sanitizer
from mbm_kernels.bench.gpu.goals import GPU_BACKENDS
from mbm_kernels.bench.gpu.log import Log
from mbm_kernels.bench.gpu.processes import (
    CHILD,
    Clock,
    Failure,
    measure,
    measure_apart,
    run_all,
)
from mbm_kernels.bench.gpu.worker import Task

STAGES = ("smoke", "tests", "goals", "bench", "all")
SMOKE_SECONDS = 60.0
TESTS_SHARE = 0.5  # of the time, when several stages run
WARM_SHARE = 0.4  # of the time of what is timed; what is not warm then compiles when it is measured
MINUTES = 9.0
# Processes at once: some 1600 kernels are compiled, 0.5 to 1 s each.
WORKERS = 12
# cuBLAS warns of its workspace wherever the tests poison memory.
WARM_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
TEST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
CONV = "tests/ops/test_conv_bias_act_triton.py"
MORE_TESTS = {
    "captioner": (["tests/gpu/test_decode_graph.py"],),
    "linear_topk": (["tests/ops/test_linear_topk_beams.py"],),
    "conv_bias_act": ([CONV, "-k", "test_every_way"], [CONV, "-k", "not test_every_way"]),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, variable in (("stage", "all"), ("ops", ""), ("minutes", ""), ("out", "")):
        parser.add_argument(f"--{name}", default=os.environ.get(name.upper()) or variable)
    given = parser.parse_args(argv)
    if given.out:
        os.environ["OUT"] = given.out
    return run(given.stage, [name for name in given.ops.split(",") if name], given.minutes)


def run(stage: str, asked: Sequence[str], minutes: str) -> int:
    if stage not in STAGES:
        raise ValueError(f"STAGE: got {stage!r}; expected one of {', '.join(STAGES)}; fix it")
    root = Path.cwd()
    benchmarks = cli.load(root / "benchmarks")
    known = [*OPS, *(b.op for b in benchmarks if b.op not in OPS)]
    names = list(asked) or known
    for name in names:
        if name not in known:
            raise ValueError(f"OPS: got {name!r}; expected one of {', '.join(known)}; fix the name")
    clock = Clock(_minutes(minutes))
    if not torch.cuda.is_available():
        raise exits.CannotMeasure(
            "gpu-check: torch sees no CUDA device; expected one; run it on a machine with a GPU"
        )
    log = Log(stage)
    chosen = [b for b in benchmarks if b.op in names]
    failures: list[str] = []
    if stage in ("smoke", "all"):
        failures += run_smoke(chosen, root, Clock(min(SMOKE_SECONDS, clock.left()) / 60), log)
    if stage in ("tests", "all"):
        failures += build(root, clock)  # the tests' own, not what the kernels of a GPU need
        tests = Clock((1.0 if stage == "tests" else TESTS_SHARE) * clock.left() / 60)
        looks = Clock(min(sanitizer.SECONDS, sanitizer.SHARE * tests.left()) / 60)
        failures += sanitizer.run(chosen, root, looks, log, workers())
        failures += run_tests(names, root, tests, log)
    if stage in ("goals", "bench", "all"):
        before = goals.measured_before(root / "benchmarks" / "results")
        tasks = goals.tasks(chosen, whole=stage == "bench", measured=before)
        warm(tasks, root, Clock(WARM_SHARE * clock.left() / 60), log)
        failures += run_benchmarks(tasks, root, clock, log)
    for failure in failures:
        log(f"FAILED {failure}")
    log(f"gpu-check: {stage}: {len(failures)} failures, {clock.spent():.0f} s")
    return exits.REGRESSION if failures else exits.OK


def workers() -> int:
    return max(1, min(WORKERS, (os.cpu_count() or 1) * 3 // 4))


def run_smoke(
    benchmarks: Sequence[Benchmark],
    root: Path,
    clock: Clock,
    log: Log,
    command: Sequence[str] = (*CHILD, "smoke"),
) -> list[str]:
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    wanted = [[task] for task in goals.smoke_tasks(benchmarks)]
    for found in measure_apart(wanted, root, clock, command, TEST_ENVIRONMENT):
        if isinstance(found, Failure):
            task = found.task
            row = {"op": task.op, "backend": task.backend, "failed": found.reason}
        else:
            row = found
        rows.append(row)
        log.keep("smoke.json", rows)
        what = f"{row['op']} ({row['backend']})"
        if reason := row.get("wrong") or row.get("failed"):
            failures.append(f"smoke: {what}: {reason}")
            log(f"smoke: {what}: {'WRONG' if 'wrong' in row else 'FAILED'}: {reason}")
        else:
            log(f"smoke: {what}: {row['error_of_budget']:.0%} of the error's budget, "
                f"{row['seconds']} s")  # fmt: skip
    return failures


def warm(
    tasks: Sequence[Task],
    root: Path,
    clock: Clock,
    log: Log,
    command: Sequence[str] = (*CHILD, "warm"),
) -> None:
    """What fails here fails again where it is measured, and is told there."""
    began, forms, late = time.monotonic(), 0, 0
    wanted = [group for group in goals.groups(tasks, workers()) if group]
    for found in measure_apart(wanted, root, clock, command, WARM_ENVIRONMENT):
        if isinstance(found, Failure):
            late += 1
            log(f"not warm: {found.task}: {found.reason}")
        else:
            forms += 1
    log(f"warm: {forms} forms, {late} tasks not, {time.monotonic() - began:.0f} s")


def _minutes(given: str) -> float:
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
    mine, file = " or ".join(backends), f"tests/ops/test_{name}.py"
    yield f"{name} backward", [file, "-k", f"({mine}) and test_backward"]
    yield f"{name} forward", [file, "-k", f"({mine}) and test_forward"]
    rest = f"({mine}) and not test_forward and not test_backward"
    yield f"{name} other tests", [file, "-k", rest]
    by_id = " or ".join(f"{name}-{backend}" for backend in backends)
    yield f"{name} on hardware", ["tests/gpu", "-k", f"{by_id} or test_{name}_"]


def run_tests(names: Sequence[str], root: Path, clock: Clock, log: Log) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-o", "faulthandler_timeout=60"]  # names the test that hangs
    given = dict(command for name in names for command in commands(name))
    for name in names:
        if not any(True for _ in commands(name)):
            log(f"{name}: no test on a GPU")
    wanted = {what: [*pytest, *arguments] for what, arguments in given.items()}
    failures = []
    for done in run_all(wanted, root, clock, workers(), TEST_ENVIRONMENT):
        last = (done.output.strip().splitlines() or ["no output"])[-1]
        if done.code == 0:
            log(f"{done.name}: {last} [{done.seconds:.0f} s]")
            continue
        how = "cut off by the time" if done.code is None else f"status {done.code}"
        log(f"{done.name}: {how}\n{done.output}")
        failures.append(f"{done.name}: {how}; pytest {' '.join(given[done.name])}")
    return failures


def run_benchmarks(
    tasks: Sequence[Task],
    root: Path,
    clock: Clock,
    log: Log,
    command: Sequence[str] = CHILD,
) -> list[str]:
    """What was wrong, failed or was not reached; a row is written before the next one begins."""
    dirty = machine.is_dirty(root)
    file = results.ResultsFile(
        root / "benchmarks" / "results",
        machine.commit(root),
        device=machine.gpu(),
        local=results.is_local(dirty, compiled=True),
    )
    failures: list[str] = []
    log(HEADER)
    for found in measure(tasks, root, clock, command):
        if isinstance(found, Failure):
            failures.append(f"{found.task}: {found.reason}")
            log(failures[-1])
            continue
        file.append(found | {"dirty": dirty})
        log(line(found))
        if reason := found.get("wrong") or found.get("failed"):
            what = f"{found['op']} {found['case']}, {found['pass']}, {found['dtype']}"
            failures.append(f"{what}: {reason}")
    log(f"written: {file.path}")
    return failures


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
    sys.exit(exits.status(main))
