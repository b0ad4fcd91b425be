"""The machine that a result belongs to, and its name as a folder."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mbm_kernels._core import env, native, processor
from mbm_kernels.bench import isa
from mbm_kernels.info import package_versions

WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
HEAPS = ("default", "warm")
HEAP_VARIABLES = ("MALLOC_", "MBM_WARM_HEAP")
MEASURED_CODE = ("csrc", "mbm_kernels", "setup.py", "benchmarks/*.py")


def device() -> str:
    """The folder of this machine's CPU results."""
    return processor.name()


def gpu() -> str:
    """The folder of this machine's GPU results, as `nvidia-h100-80gb-hbm3`."""
    return processor.slug(torch.cuda.get_device_name())


def heap() -> str:
    """The heap mode of this process: "default", "warm", or "custom" for other malloc settings."""
    given = {name: value for name, value in os.environ.items() if name.startswith(HEAP_VARIABLES)}
    if not given:
        return "default"
    return "warm" if given == WARM_HEAP else "custom"


def heap_environment(mode: str) -> dict[str, str]:
    """The environment in which a re-executed process has that heap.

    In the warm heap freed memory stays mapped, so that calls with large tensors do not page-fault
    each time.

    Raises:
        ValueError: for an unknown mode, or "warm" without glibc, whose malloc it sets.
    """
    if mode not in HEAPS:
        raise ValueError(f"heap: got {mode!r}; expected one of {', '.join(HEAPS)}; fix the name")
    if mode == "warm" and platform.libc_ver()[0] != "glibc":
        raise ValueError("heap: got 'warm'; expected glibc, whose malloc it sets; use 'default'")
    rest = {name: v for name, v in os.environ.items() if not name.startswith(HEAP_VARIABLES)}
    return rest | (WARM_HEAP if mode == "warm" else {})


def run_in_heap(mode: str, module: str) -> None:
    """Executes `python -m module` with the same arguments anew, unless the process has that heap.

    Raises:
        ValueError: as `heap_environment`.
    """
    if heap() != mode:
        arguments = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, arguments, heap_environment(mode))


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, None outside git."""
    return _git(folder, "rev-parse", "HEAD")


def is_dirty(folder: Path) -> bool | None:
    """Whether the measured code differs from that commit; None outside git."""
    changes = _git(folder, "status", "--porcelain", "--", *MEASURED_CODE)
    return None if changes is None else bool(changes)


def facts() -> dict[str, Any]:
    """What else a figure depends on, ready for JSON."""
    fields = processor.fields(processor.read_cpuinfo())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "isa": native.isa() or processor.best_isa(processor.read_cpuinfo()),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "openmp_runtimes": native.openmp_runtimes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": package_versions(),
        "system": f"{platform.system()} {platform.release()}",
        "environment": env.in_force(),
        "libc": " ".join(platform.libc_ver()),
        "byteorder": sys.byteorder,
    }


def process_environment(mode: str) -> dict[str, str]:
    """That of a heap, with the stock libraries held to the ISA that MBM_ISA asks for."""
    return heap_environment(mode) | isa.environment(env.isa())


class Others:
    """CPU time that the rest of the machine takes from its making on, in cores.

    All of /proc/stat that is not idle, time stolen by other guests included, less what this process
    and its children took.
    """

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all CPUs busy, of this process and its children."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        fields = [int(n) for n in path.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = fields
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])

    def cores(self) -> float | None:
        """None where /proc does not tell."""
        begin, end = self._begin, self._now()
        if begin is None or end is None:
            return None
        clock, busy, own = (b - a for a, b in zip(begin, end, strict=True))
        return max(0.0, busy - own) / max(clock, 1e-3)


def cores() -> int:
    return os.cpu_count() or 1
