"""A process that times cases for another: a task as JSON a line in, what it found a line out."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from mbm_kernels._core import timing
from mbm_kernels.bench import cli, harness


def main(folder: Path, op: str, index: int) -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    (benchmark,) = cli.load(folder, [op])
    say({"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        (case,) = (c for c in benchmark.cases if c.label == task["case"])
        settings = harness.Settings(**task["settings"])
        try:
            with timing.threads(task["threads"]):
                found = harness.sample(
                    benchmark, case, task["pass"], settings, seed=index, details=index == 0
                )
        except Exception as error:  # of an operation or of torch: whoever asked says it
            say({"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        say(found.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
