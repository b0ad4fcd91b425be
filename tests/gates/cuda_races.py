"""The CUDA kernels under ThreadSanitizer, intact and with each barrier taken out: `make sanitize`.

Emulated on the host, each CUDA thread is a thread to the sanitizer and only barriers order memory
(csrc/common/gpu/emulation.h). An intact kernel must give no report, and a kernel without any one of
its barriers a report: a barrier that nobody misses is taken out of the source.

    python -m tests.gates.cuda_races
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.gates.planting import ROOT
from tests.gates.sanitizers import can_fix_addresses, compiler

CSRC = ROOT / "csrc"
FLAGS = ("-std=c++20", "-O1", "-g1", "-DMBM_EMULATED", "-Wno-unknown-pragmas", "-Wno-psabi")
SECONDS = 600


@dataclass(frozen=True)
class Run:
    """What one run of a kernel's cases said; `reports` counts the races."""

    hash: str
    barriers: dict[str, int]
    reports: int
    where: str  # of the first race
    failed: str


def build(folder: Path) -> Path:
    """The driver; the emulation itself is not instrumented, since its state is not a kernel's."""
    kernels = [p for p in sorted(CSRC.glob("*/*_cuda*.cu")) if p.parent.name != "common"]
    checked = [*kernels, ROOT / "tests" / "gates" / "cuda_races.cpp"]
    jobs = [(path, ("-fsanitize=thread",)) for path in checked]
    jobs += [
        (path, ("-DMBM_CHECK_RACES",)) for path in sorted((CSRC / "common" / "gpu").glob("*.cpp"))
    ]

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> Path:
        path, flags = job
        out = folder / f"{path.parent.name}_{path.stem}.o"
        source = ["-x", "c++", "-c", str(path), "-o", str(out)]
        subprocess.run([*compiler(), *FLAGS, *flags, f"-I{CSRC}", *source], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, jobs)]
    driver = folder / "cuda_races"
    subprocess.run([*compiler(), "-fsanitize=thread", *objects, "-o", str(driver)], check=True)
    return driver


def run(driver: Path, kernel: str, dropped: str = "") -> Run:
    command = [str(driver), kernel, *([dropped] if dropped else [])]
    if can_fix_addresses():
        command = ["setarch", "-R", *command]
    options = {"TSAN_OPTIONS": "halt_on_error=0:exitcode=0:report_thread_leaks=0"}
    done = subprocess.run(
        command, env={**os.environ, **options}, capture_output=True, text=True, timeout=SECONDS
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    where = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY: ")]
    return Run(
        next((rest[0] for kind, *rest in lines if kind == "hash"), ""),
        {rest[1]: int(rest[0]) for kind, *rest in lines if kind == "barrier"},
        done.stderr.count("WARNING: ThreadSanitizer"),
        where[0].partition("csrc/")[2] if where else "",
        done.stderr[-2000:] if done.returncode else "",
    )


def check() -> list[str]:
    """Prints the table of barriers; returns what should not be."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        driver = build(Path(name))
        listed = subprocess.run([str(driver)], capture_output=True, text=True, check=True)
        for kernel in listed.stdout.split():
            intact = run(driver, kernel)
            print(f"{'CUDA kernel, barrier taken out':58}{'reports':>8}  results  first race")
            print(f"{kernel + ', intact':58}{intact.reports:8}")
            if intact.reports or intact.failed:
                wrong.append(f"{kernel}: {intact.reports} reports: {intact.where}{intact.failed}")
            runs = pool.map(lambda site: run(driver, kernel, site), intact.barriers)  # noqa: B023
            for site, found in zip(intact.barriers, runs, strict=True):
                results = "same" if found.hash == intact.hash else "wrong"
                what = f"{kernel}, {site}"
                print(f"{what:58}{found.reports:8}  {results:7}  {found.where[:70]}", flush=True)
                if not found.reports:
                    wrong.append(f"{what}: no report without it: take it out")
    return wrong


if __name__ == "__main__":
    missed = check()
    print("\n".join(missed))
    sys.exit(1 if missed else 0)
