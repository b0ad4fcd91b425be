"""compute-sanitizer over the smallest call of each CUDA C++ kernel: a part of gpu-check's tests."""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mbm_kernels.bench.benchmark import Benchmark
from mbm_kernels.bench.gpu import goals
from mbm_kernels.bench.gpu.log import Log
from mbm_kernels.bench.gpu.processes import CHILD, Clock, Failure, measure
from mbm_kernels.bench.gpu.worker import Task

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 60.0
SHARE = 0.25  # at most, of the tests' time
REPORT = "sanitizer.txt"
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", re.MULTILINE)
# With an allocation for each tensor, what is read past one lies in none.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Finding(NamedTuple):
    """What one tool says of one task's kernels."""

    tool: str
    task: Task
    wrong: str  # empty where it found nothing
    report: str


def program() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path=str(Path(home) / "bin"))


def run(
    benchmarks: Sequence[Benchmark],
    root: Path,
    clock: Clock,
    log: Log,
    workers: int,
    command: Sequence[str] = (*CHILD, "once"),
) -> list[str]:
    """What it found wrong or could not look at; all reports go into one file beside the log."""
    tasks = goals.cuda_tasks(benchmarks)
    found = program()
    if not tasks or found is None:
        log(f"compute-sanitizer: left out: {_why_not(tasks)}")
        return []
    failures: list[str] = []
    reports: list[str] = []
    pairs = list(itertools.product(TOOLS, tasks))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:

        def look(pair: tuple[str, Task]) -> Finding:
            return _look(found, *pair, Path(folder), root, clock, command)

        for each in pool.map(look, pairs):
            what = f"{each.tool}: {each.task}"
            log(f"{what}: {each.wrong or 'nothing found'}")
            reports.append(f"{what}\n{each.report}")
            log.attach(REPORT, "\n".join(reports))
            if each.wrong:
                failures.append(f"{what}: {each.wrong}; see {REPORT}")
    return failures


def _why_not(tasks: Sequence[Task]) -> str:
    if not tasks:
        return "no CUDA C++ kernel runs here"
    return "it is not installed; it comes with the CUDA toolkit"


def _look(
    found: str,
    tool: str,
    task: Task,
    folder: Path,
    root: Path,
    clock: Clock,
    command: Sequence[str],
) -> Finding:
    path = folder / f"{tool}-{task.op}.txt"
    sanitizer = (found, "--tool", tool, "--target-processes", "all", "--log-file", str(path))
    events = list(measure([task], root, clock, (*sanitizer, *command), ENVIRONMENT))
    report = path.read_text() if path.exists() else ""
    failed = [event.reason for event in events if isinstance(event, Failure)]
    counts = [int(count) for count in SUMMARY.findall(report)]
    wrong = ""
    if any(counts):
        wrong = f"{sum(counts)} errors"
    elif failed:
        wrong = failed[0]
    elif not counts:
        wrong = "no summary in its report"
    return Finding(tool, task, wrong, report)
