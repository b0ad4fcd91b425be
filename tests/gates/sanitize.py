"""The kernels under sanitizers, between guard pages: `make sanitize`.

    python -m tests.gates.sanitize [--examples 24] [--ops gru ...]

Native calls of every operation are recorded over drawn arguments (record.py), in each ISA and for
THREADS, and made again (replay.py), always with guard pages around each buffer:

    as built             both ends of each buffer against a page that may not be touched
    address, undefined   every ISA; scratch memory between guard pages too. Where the CPU lacks
                         AVX-512, its kernels in AVX2's instructions (avx512_lowered)
    thread               AVX2, with the std::thread build of csrc/common/parallel.h
    coverage             AVX2: which lines run, of all calls together (coverage.py); then the first
                         calls of each function with each allocation of scratch memory failing

Then a barrier and bounds are taken out in a copy of the tree, and each must be reported, as must
each barrier of the CUDA kernels, emulated on the host (cuda_races.py). Exit
status 1 for a report where none may be, or none where one must.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mbm_kernels._core import native
from tests.gates import coverage, cuda_races
from tests.gates.planting import ROOT, Mutant, build, copy_tree, planted
from tests.gates.record import COMMON, kernels
from tests.gates.sanitizers import can_fix_addresses, compiler

ONE_ISA = ("thread", "coverage")
THREAD_ISA = "avx2"  # threads do the same in every ISA; valgrind's and sanitizers' lanes are 8
THREADS = {"gru_bidirectional": 4}  # 3 for the others; an odd number runs no directions at once
REPORTED, HANGS = 77, 124
REPLAY_SECONDS = 1800  # a thread that waits for one that threw waits for ever
OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORTED}",
    "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={REPORTED}",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={REPORTED}",
}

PLANTED = {
    "thread": (
        Mutant(
            "barrier-removed",
            "csrc/gru/gru_cpu_backward.cpp",
            "if (grid.units > 1) barriers_[share.group].wait(grid.units);",
            "",
            "data race",
        ),
    ),
    "address": (
        Mutant(
            "store-past-the-end",
            "csrc/common/vector_math_cpu.cpp",
            "store_n(y + i, f(load_n(x + i, tail)), tail);",
            "store(y + i, f(load_n(x + i, tail)));",
            "AddressSanitizer",
        ),
        Mutant(
            "load-past-the-end",
            "csrc/common/vector_math_cpu.cpp",
            "store_n(y + i, f(load_n(x + i, tail)), tail);",
            "store_n(y + i, f(load(x + i)), tail);",
            "AddressSanitizer",
        ),
    ),
}


@dataclass(frozen=True)
class Build:
    """An extension, and what must be loaded before it."""

    name: str
    path: Path
    isa: str | None = None  # the only one that it holds
    library: str | None = None

    def replay(self, records: Path, *options: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "tests" / "gates" / "replay.py")
        command = [sys.executable, "-S", script, str(self.path), str(records)]
        command += options
        environment = {**os.environ, **OPTIONS}
        if self.library is not None:
            found = subprocess.check_output([*compiler(), f"-print-file-name={self.library}"])
            environment["LD_PRELOAD"] = found.decode().strip()
        if self.name == "thread":
            command = ["setarch", "-R", *command] if can_fix_addresses() else command
        try:
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=REPLAY_SECONDS
            )
        except subprocess.TimeoutExpired as late:
            told = late.stderr.decode() if isinstance(late.stderr, bytes) else (late.stderr or "")
            return subprocess.CompletedProcess(command, HANGS, "", f"{told}\nhangs\n")


def runs(build: Build) -> list[tuple[str, ...]]:
    """The options of each replay of one operation's calls."""
    if build.name == "as built":
        return [("--placement", "end"), ("--placement", "start")]
    return [(), ("--fail-allocations",)] if build.name == "coverage" else [()]


def extension(folder: Path) -> Path:
    return folder / "mbm_kernels" / f"_C_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def sanitized(root: Path, sanitizer: str, isa: str = THREAD_ISA) -> Build:
    """Compiles the kernels of the tree at `root` for one ISA; what is up to date stays."""
    folder = f"build/sanitize/{sanitizer}" + ("" if sanitizer in ONE_ISA else f"-{isa}")
    places = ("--build-lib", folder, "--build-temp", f"{folder}/temp")
    build(root, *places, MBM_SANITIZE=sanitizer, MBM_BUILD_ISA=isa)
    library = {"thread": "libtsan.so", "address": "libasan.so"}.get(sanitizer)
    return Build(sanitizer, extension(root / folder), isa, library)


def isas() -> list[str]:
    """Those that run here, AVX-512's kernels among them in one form or the other."""
    runs_here = native.isas()
    return [isa for isa in runs_here if isa != "avx512_lowered" or "avx512" not in runs_here]


def record(path: Path, op: str, isa: str, examples: int) -> None:
    command = [sys.executable, "-m", "tests.gates.record", str(path), "--isa", isa, "--ops", op]
    command += ["--examples", str(examples), "--threads", str(THREADS.get(op, 3))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: recording {op} failed:\n{done.stdout}{done.stderr}")


def report(done: subprocess.CompletedProcess[str]) -> str:
    """The call in which a replay ended, and what was said of it."""
    lines = done.stderr.splitlines()
    calls = [i for i, line in enumerate(lines) if " [" in line and "] " in line]
    last = next((i for i in reversed(calls) if not lines[i].startswith((" ", "="))), 0)
    return "\n".join([f"in the call {lines[last]}", *lines[last + 1 : last + 40]]) if lines else ""


def check(op: str, isa: str, builds: Iterable[Build], examples: int, folder: Path) -> list[str]:
    """Reports of all builds over the recorded calls of one operation in one ISA."""
    records, found = folder / f"{op}.{isa}", []
    record(records, op, isa, examples)
    said: dict[str, None] = {}  # the same of most replays
    for each in builds:
        if each.isa not in (None, isa):
            continue
        for options in runs(each):
            done = each.replay(records, *options)
            said |= {done.stdout.strip(): None}
            if done.returncode != 0:
                what = " ".join((each.name, *options))
                found.append(f"{op}, {isa}, {what}: {report(done)}")
    records.unlink()
    ran = "; ".join(filter(None, said))
    print(f"{'REPORTED' if found else 'clean':9}{op:28}{isa:16}{ran}", flush=True)
    return found


def check_planted(folder: Path, examples: int) -> list[str]:
    """Names of planted bugs that no sanitizer reported."""
    missed = []
    copy = folder / "tree"
    copy_tree(copy, f"build/sanitize/address-{THREAD_ISA}", "build/sanitize/thread")
    for sanitizer, mutants in PLANTED.items():
        for mutant in mutants:
            op = mutant.path.split("/")[1]
            records = folder / "planted"
            record(records, op, THREAD_ISA, examples)
            with planted(mutant, copy):
                done = sanitized(copy, sanitizer).replay(records)
            caught = done.returncode != 0 and mutant.caught_by in done.stderr
            missed += [] if caught else [mutant.name]
            what = mutant.caught_by if caught else ""
            print(f"{'caught' if caught else 'MISSED':9}{mutant.name:28}{what}", flush=True)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=24, help="of each of the two sizes")
    parser.add_argument("--ops", nargs="*", default=[COMMON, *kernels()])
    given = parser.parse_args()
    started = time.monotonic()
    builds = [Build("as built", extension(ROOT))]
    builds += [sanitized(ROOT, "address", isa) for isa in isas()]
    builds += [sanitized(ROOT, sanitizer) for sanitizer in ONE_ISA]
    counted = ROOT / "build" / "sanitize" / "coverage"
    coverage.clear(counted)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        work = [
            pool.submit(check, op, isa, builds, given.examples, folder)
            for op in given.ops
            for isa in isas()
        ]
        reports = [found for each in work for found in each.result()]
        if set(given.ops) >= {COMMON, *kernels()}:
            reports += coverage.check(counted, compiler())
        missed = check_planted(folder, given.examples)
    if set(given.ops) >= {COMMON, *kernels()}:
        reports += cuda_races.check()
    for found in reports:
        print(f"\n{found}")
    print(f"{len(reports)} reports, {len(missed)} planted bugs missed, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    sys.exit(1 if reports or missed else 0)


if __name__ == "__main__":
    main()
