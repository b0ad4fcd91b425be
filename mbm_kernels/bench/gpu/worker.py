"""A process of `make gpu-check`: tasks as JSON in, a line of JSON for each event out.

    python -m mbm_kernels.bench.gpu.worker [smoke | once | warm | measure]

smoke checks one tiny call, once calls it for a sanitizer, warm calls every form once, so that what
they compile lies in the disk caches of Inductor and Triton, measure gives rows. It ends early,
after a task, where its device is lost to it: whoever started it goes on in another.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mbm_kernels.bench import cli
from mbm_kernels.bench.benchmark import Benchmark, Case
from mbm_kernels.bench.gpu import measure


class Task(NamedTuple):
    """One row, hot and cold: a case of the benchmark `op`, by its label."""

    op: str
    case: str
    which: str
    dtype: str
    backend: str

    def __str__(self) -> str:
        return f"{self.op} {self.case}, {self.which}, {self.dtype}"


# Sizes by letter that a smoke test goes up to: past a tile of some kernels, compiled as any other.
TINY = {"B": 2, "N": 16, "T": 3, "S": 20, "V": 200, "Y": 16, "C": 64, "K": 64, "H": 64}
TINY |= {"R": 16, "D": 64, "E": 64, "Hs": 64, "Ht": 64}


def tiny(case: Case, which: str) -> Case:
    sizes = {letter: min(size, TINY.get(letter, size)) for letter, size in case.sizes.items()}
    return replace(case, sizes=sizes, check={}, check_gradients={}, passes=(which,))


def _device() -> torch.device:
    """A CPU where there is no GPU: Triton's interpreter rehearses there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _measure(benchmark: Benchmark, case: Case, task: Task) -> Iterator[dict[str, Any]]:
    settings = measure.GpuSettings(dtypes=(task.dtype,), backend=task.backend)
    yield from measure.run(benchmark, [replace(case, passes=(task.which,))], settings, _device())


def _smoke(benchmark: Benchmark, case: Case, task: Task) -> Iterator[dict[str, Any]]:
    begin = time.monotonic()
    row = measure.checked(benchmark, tiny(case, task.which), task, _device())
    yield row | {"seconds": round(time.monotonic() - begin, 1)}
    if reason := measure.lasting():
        raise measure.LastingError(reason)


def _once(benchmark: Benchmark, case: Case, task: Task) -> Iterator[dict[str, Any]]:
    measure.once(benchmark, tiny(case, task.which), task, _device())
    yield {"op": task.op, "backend": task.backend}


def _warm(benchmark: Benchmark, case: Case, task: Task) -> Iterator[dict[str, Any]]:
    settings = measure.GpuSettings(dtypes=(task.dtype,), backend=task.backend)
    for name, reason in measure.warm(benchmark, case, task.which, settings, _device()):
        yield {"op": task.op, "form": name, "unavailable": reason}
    if reason := measure.lasting():
        raise measure.LastingError(reason)


WORK: dict[str, Callable[[Benchmark, Case, Task], Iterator[dict[str, Any]]]] = {
    "smoke": _smoke,
    "once": _once,
    "warm": _warm,
    "measure": _measure,
}


def main(what: str = "measure") -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not among the events

    def say(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    benchmarks = {b.op: b for b in cli.load(Path.cwd() / "benchmarks")}
    for task in map(Task._make, json.load(sys.stdin)):
        say(started=task)
        benchmark = benchmarks[task.op]
        (case,) = (c for c in benchmark.gpu_cases if c.label == task.case)
        try:
            for row in WORK[what](benchmark, case, task):
                say(row=row)
        except measure.LastingError as error:
            say(done=task, lasting=str(error))
            return 0
        say(done=task)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
