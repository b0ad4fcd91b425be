"""The processor: its name, its caches, and how fast it computes and copies."""

import functools
import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mbm_kernels._core import env, files, native

VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "HygonGenuine": "hygon"}
COPIED = 1 << 26  # bytes, past every cache that one process can have
REPEATS = 5


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def fields(cpuinfo: str) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    first = cpuinfo.strip().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def best_isa(cpuinfo: str) -> str:
    """The widest code path of csrc that these CPU flags allow."""
    flags = set(fields(cpuinfo).get("flags", "").split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    if {"avx2", "fma", "f16c"} <= flags:
        return "avx2"
    return "baseline"


def cpu_slug(cpuinfo: str, isa: str | None = None) -> str:
    """Vendor, family, model and ISA, as `amd-family26-model2-avx512`.

    A name alone, such as "AMD EPYC", is shared by generations.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
        isa: the code path in use, where it is not the best of the CPU's.
    """
    found = fields(cpuinfo)
    isa = isa or best_isa(cpuinfo)
    if "vendor_id" in found and "cpu family" in found:
        vendor = VENDORS.get(found["vendor_id"], slug(found["vendor_id"]))
        return f"{vendor}-family{found['cpu family']}-model{found.get('model', '0')}-{isa}"
    if "CPU implementer" in found:
        part = found.get("CPU part", "0x0")
        return f"arm-implementer{int(found['CPU implementer'], 16)}-part{int(part, 16)}-{isa}"
    return f"{slug(platform.machine() or 'unknown')}-{isa}"


def read_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def name() -> str:
    """This machine's CPU and the code path in use, as a folder of results is called."""
    return cpu_slug(read_cpuinfo(), native.isa())


def cache_bytes() -> tuple[int, int]:
    """Bytes of the second-level and last-level caches that one process can have; 0: not known."""
    found = {2: 0, 3: 0}
    seen = set()
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (level, (index / "shared_cpu_list").read_text().strip())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if level in found and shared not in seen and size.endswith("K"):
            seen.add(shared)
            found[level] += int(size[:-1]) * 1024
    return found[2], max(found[2], found[3])


@dataclass(frozen=True)
class Rates:
    """Of one thread: float32 operations a second by FMAs, and bytes a second copied from memory."""

    operations: float
    bytes: float


def measured_rates() -> Rates:
    """The best rates of some repetitions, about 0.1 s in all."""
    cpu, source = native.cpu(), torch.ones(COPIED // 8)
    target, iterations = torch.zeros_like(source), 200_000
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arithmetic = min(_seconds(lambda: cpu.peak_run(iterations, 1)) for _ in range(REPEATS))
        copy = min(_seconds(lambda: target.copy_(source)) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(before)
    return Rates(cpu.peak_operations() * iterations / arithmetic, COPIED / copy)


@functools.cache
def rates() -> Rates:
    """`measured_rates`, measured once for a machine and kept in the cache folder."""
    path = env.cache_dir() / f"rates-{name()}.json"
    try:
        return Rates(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # absent, cut short, or of another version
        found = measured_rates()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, json.dumps(asdict(found)).encode())
    except OSError:
        return found  # a folder that cannot be written costs each process the measurement
    return found


def _seconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start
