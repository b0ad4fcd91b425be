"""A process of `make gpu-check` that measures: tasks as JSON in, a line of JSON for each event out.

It ends early, after a task, where its device is lost to it: whoever started it goes on in another.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mbm_kernels.bench import cli, gpu


class Task(NamedTuple):
    """One row, hot and cold: a case of the benchmark `op`, by its label."""

    op: str
    case: str
    which: str
    dtype: str
    backend: str

    def __str__(self) -> str:
        return f"{self.op} {self.case}, {self.which}, {self.dtype}"


def main() -> int:
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
        settings = gpu.GpuSettings(dtypes=(task.dtype,), backend=task.backend)
        try:
            for row in gpu.run(benchmark, [replace(case, passes=(task.which,))], settings):
                say(row=row)
        except gpu.LastingError as error:
            say(done=task, lasting=str(error))
            return 0
        say(done=task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
