"""Rows over several processes, all of one operation alive at once: each task is timed in one after
the other, so that a row is whole as soon as the last has answered."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mbm_kernels.bench.benchmark import Benchmark, Case
from mbm_kernels.bench.harness import Sampled, Settings

LEAST = 5  # processes of a row that is published
GRACE_SECONDS = 2.0
PACKAGES = Path(__file__).resolve().parents[2]


class Worker:
    """One process with the benchmark of an operation; it has this process's environment."""

    def __init__(self, folder: Path, op: str, index: int):
        # The package that is measured here, whatever is installed.
        path = os.pathsep.join(filter(None, (str(PACKAGES), os.environ.get("PYTHONPATH"))))
        self._op, self._index = op, index
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mbm_kernels.bench.worker", str(folder), op, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for whoever started it, which ends it
        )

    def answer(self) -> dict[str, Any]:
        """
        Raises:
            ValueError: when the process ended, or says that a form failed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {}
        if reason := found.get("failed"):
            raise ValueError(f"bench: {self._op}, process {self._index}: {reason}")
        if not found:
            raise ValueError(
                f"bench: {self._op}: process {self._index} got status {self._process.wait()} "
                "before its answer; expected times; see above, and run with --processes 1"
            )
        return found

    def ask(self, task: dict[str, Any]) -> Sampled:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # where it ended, its status says more
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        return Sampled.from_json(self.answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # amid a task that nobody waits for
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Pool:
    """A source of `harness.run`: the processes of one operation, ended with the context."""

    def __init__(self, folder: Path, op: str, count: int):
        self._stack = ExitStack()
        self._workers: list[Worker] = []
        for index in range(count):
            worker = Worker(folder, op, index)
            self._stack.callback(worker.close)
            self._workers.append(worker)

    def __enter__(self) -> "Pool":
        try:
            for worker in self._workers:
                worker.answer()  # it has loaded torch, and takes no time from the others
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(
        self, benchmark: Benchmark, case: Case, which: str, settings: Settings
    ) -> Sequence[Sampled]:
        task = {
            "case": case.label,
            "pass": which,
            "threads": torch.get_num_threads(),
            "settings": asdict(settings),
        }
        return [worker.ask(task) for worker in self._workers]
