"""Plants bugs in the kernels, one at a time, in copies of the tree; the tests must see each.

    make mutants        or: python -m tests.gates.mutants [--only NAME ...]

Each copy holds one ISA, the widest that runs here, and is compiled anew where the bug lies
(bugs.py, bugs_conv.py); objects of the tree that are up to date are copied with it. The
tests that a mutant names run first; only a mutant that survives them meets all tests of its
operation. Exit status 0 when every one is caught, 1 otherwise; 2 when a mutant's text is not found,
which means that the kernel changed and the mutant must follow.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mbm_kernels._core import native
from tests.gates import bugs, bugs_conv
from tests.gates.planting import OBJECTS, ROOT, Mutant, build, copy_tree, planted

COPIES = 2  # as many mutants at a time
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
COMMON_TESTS = "tests/ops/test_gru.py tests/core/test_csrc.py"

MUTANTS = (*bugs.BUGS, *bugs_conv.BUGS)


def more_tests(mutant: Mutant) -> str:
    """All tests of the operation or package in whose folder the bug lies."""
    top, folder, *rest = Path(mutant.path).with_suffix("").parts
    tests = ROOT / "tests" / ("ops" if top == "csrc" else folder.strip("_"))
    stem = folder if top == "csrc" else rest[0]
    family = stem.partition("_")[0]  # of test_conv_native.py, too
    found = {*tests.glob(f"test_{stem}*.py"), *tests.glob(f"test_{family}_*.py")}
    names = sorted(found) or ([tests] if top != "csrc" else [])
    return " ".join(str(path.relative_to(ROOT)) for path in names) or COMMON_TESTS


def run_tests(folder: Path, arguments: str) -> tuple[bool, str]:
    """Whether they pass, and the first that failed."""
    done = subprocess.run(
        [*PYTEST, *arguments.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        return False, f"tests ended by {signal.Signals(-done.returncode).name}"
    if done.returncode not in (0, 1):
        raise SystemExit(f"mutants: pytest did not run:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 0, failed[0].split(" - ")[0].split("::")[-1] if failed else ""


def try_one(mutant: Mutant, copies: "queue.Queue[Path]", isa: str) -> bool:
    """Whether the tests see it."""
    folder = copies.get()
    try:
        with planted(mutant, folder):
            build(folder, MBM_BUILD_ISA=isa)
            passed, first = run_tests(folder, mutant.caught_by)
            if passed:
                passed, first = run_tests(folder, more_tests(mutant))
    finally:
        copies.put(folder)
    print(f"{'SURVIVED' if passed else 'caught':9}{mutant.name:48}{first}", flush=True)
    return not passed


def check_sound(folder: Path, chosen: list[Mutant]) -> None:
    """Ends the program where the tests fail without any bug planted."""
    for arguments in sorted({mutant.caught_by for mutant in chosen}):
        passed, first = run_tests(folder, arguments)
        if not passed:
            raise SystemExit(f"mutants: {arguments} fails without a bug: {first}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of mutants")
    only = parser.parse_args().only
    known = {m.name: m for m in MUTANTS}
    if wrong := [name for name in only or () if name not in known]:
        parser.error(f"no mutant {wrong[0]!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in only or known]
    started, isa = time.monotonic(), native.cpu().best_isa()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(COPIES) as pool:
        first = Path(name) / "0"
        copy_tree(first, OBJECTS)
        build(first, MBM_BUILD_ISA=isa)
        copies: queue.Queue[Path] = queue.Queue()
        copies.put(first)
        for i in range(1, COPIES):
            copies.put(Path(shutil.copytree(first, Path(name) / str(i))))
        check_sound(first, chosen)
        print(f"compiled and sound after {time.monotonic() - started:.0f} s", flush=True)
        caught = list(pool.map(lambda mutant: try_one(mutant, copies, isa), chosen))
    print(f"{sum(caught)} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    sys.exit(0 if all(caught) else 1)


if __name__ == "__main__":
    main()
