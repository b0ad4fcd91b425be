"""The processes that `make gpu-check` starts: what faults, hangs or crashes costs one of them."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbm_kernels.bench.gpu.worker import Task

CHILD = (sys.executable, "-m", "mbm_kernels.bench.gpu.worker")
NONE: Mapping[str, str] = {}
TASK_SECONDS = 150.0  # between two events; a model's compilation takes the longest
GRACE_SECONDS = 10.0  # for pytest to print, once interrupted


class Clock:
    def __init__(self, minutes: float):
        self.begin = time.monotonic()
        self.end = self.begin + 60 * minutes

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def spent(self) -> float:
        return time.monotonic() - self.begin


def _kill(process: "subprocess.Popen[str]") -> None:
    """With its children: compilers have workers of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Finished:
    name: str
    code: int | None  # None: cut off by the time
    output: str
    seconds: float


def run_all(
    commands: Mapping[str, Sequence[str]],
    root: Path,
    clock: Clock,
    workers: int,
    environment: Mapping[str, str],
) -> Iterator[Finished]:
    """Each command as it ends, `workers` at a time; none begins or goes on after the time."""

    def run(name: str, command: Sequence[str]) -> Finished:
        begin = time.monotonic()
        if not clock.left():
            return Finished(name, None, "", 0.0)
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=root,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            code: int | None = None
            try:
                code = process.wait(clock.left())
            except subprocess.TimeoutExpired:
                # pytest then says what failed before.
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
            finally:
                _kill(process)
            output.seek(0)
            return Finished(name, code, output.read(), time.monotonic() - begin)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, name, command) for name, command in commands.items()]
        for future in as_completed(futures):
            yield future.result()


@dataclass(frozen=True)
class Failure:
    task: Task
    reason: str


def measure_apart(
    groups: Sequence[Sequence[Task]],
    root: Path,
    clock: Clock,
    command: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[dict[str, Any] | Failure]:
    """As `measure`, all groups at once, each in processes of its own; its rows when it ends."""

    def run(group: Sequence[Task]) -> list[dict[str, Any] | Failure]:
        return list(measure(group, root, clock, command, environment))

    with ThreadPoolExecutor(max(1, len(groups))) as pool:
        for future in as_completed([pool.submit(run, group) for group in groups]):
            yield from future.result()


def measure(
    tasks: Sequence[Task],
    root: Path,
    clock: Clock,
    command: Sequence[str] = CHILD,
    environment: Mapping[str, str] = NONE,
) -> Iterator[dict[str, Any] | Failure]:
    """Rows as they come, and for each task without one why.

    A task that its process does not survive is left out, and the ones after it go to another.
    """
    left = list(tasks)
    while left and clock.left():
        reason = None
        for event in _events(left, root, clock, command, environment):
            if "row" in event:
                yield event["row"]
            elif "done" in event:
                left.pop(0)
            reason = event.get("ended")
        if left and reason is not None:
            yield Failure(left.pop(0), reason)
    for task in left:
        yield Failure(task, "not reached in the time")


def _events(
    tasks: Sequence[Task],
    root: Path,
    clock: Clock,
    command: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """What a process says; last of all, where it ended before its time, {"ended": why}."""
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdout = process.stdout
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    try:
        threading.Thread(target=read, daemon=True).start()
        with suppress(BrokenPipeError):  # where it ended, its exit status says more
            process.stdin.write(json.dumps(tasks))
            process.stdin.close()
        while True:
            seconds = min(TASK_SECONDS, clock.left())
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                late = seconds >= TASK_SECONDS
                yield {"ended": f"no answer in {seconds:.0f} s" if late else "cut off by the time"}
                return
            if line is None:
                break
            yield json.loads(line)
        code = process.wait()
        if code:
            yield {"ended": f"its process ended with status {code}, see above"}
    finally:
        _kill(process)
