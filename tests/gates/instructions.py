"""Counts the kernels' instructions on fixed small cases and holds them to a baseline: `make gate`.

    python -m tests.gates.instructions [--update] [--base REVISION]

The native calls of each case (instruction_cases.py) are recorded and made again by replay.py, a
driver without torch, under valgrind's callgrind: AVX2, one thread, scratch memory already there.
Counts repeat to a few thousandths whatever else the machine does, unlike times. A baseline holds
for one compiler: benchmarks/instructions/<compiler>.json. Where there is none, or with --base, the
other revision is compiled and counted too (base_revision.py), and no case may be worse than there
by more than 2 %, unless a baseline that was recorded since says that it moved.

A count more than 2 % away from its baseline, either way, is a regression: a gain is recorded too.
--update records, and prints the table of what moved for the commit message; a case more than
5 % worse is refused unless benchmarks/instructions/why/<case>.md names the new count and gives the
reason and the times measured. Exit statuses: mbm_kernels/bench/exits.py.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mbm_kernels._core import native
from mbm_kernels.bench import exits
from mbm_kernels.bench.exits import CannotMeasure
from tests.gates import base_revision, record
from tests.gates.instruction_cases import cases
from tests.gates.planting import ROOT
from tests.gates.sanitize import extension
from tests.gates.sanitizers import compiler

ISA = "avx2"  # the widest that the distribution's valgrind decodes
HELD, REFUSED, MOST = 0.02, 0.05, 20_000_000
FOLDER = ROOT / "benchmarks" / "instructions"

Counts = dict[str, int]


@dataclass(frozen=True)
class Moved:
    name: str
    before: int | None
    after: int | None

    @property
    def change(self) -> float | None:
        """Of the count, as a fraction; None for a case that came or went."""
        return None if not self.before or self.after is None else self.after / self.before - 1

    def __str__(self) -> str:
        def number(value: int | None) -> str:
            return "-" if value is None else f"{value:,}"

        change = "" if self.change is None else f"{self.change:+.1%}"
        return f"{self.name:62}{number(self.before):>14}{number(self.after):>14}{change:>9}"


def compare(before: Counts, after: Counts, least: float) -> list[Moved]:
    """What came, went or moved by more than `least`."""
    every = [Moved(n, before.get(n), after.get(n)) for n in sorted({*before, *after})]
    return [moved for moved in every if moved.change is None or abs(moved.change) > least]


def why(folder: Path, name: str) -> Path:
    return folder / "why" / f"{re.sub('[^a-z0-9]+', '-', name)}.md"


def unexplained(folder: Path, moves: list[Moved]) -> list[Moved]:
    """Those more than 5 % worse without a file that names the new count."""

    def explained(moved: Moved) -> bool:
        path = why(folder, moved.name)
        return path.is_file() and f"{moved.after}" in path.read_text().replace(",", "")

    return [m for m in moves if m.change is not None and m.change > REFUSED and not explained(m)]


def compiler_key() -> str:
    version = subprocess.check_output([*compiler(), "-dumpfullversion"], text=True).strip()
    return f"{Path(compiler()[0]).name}-{version}"


def require_valgrind() -> None:
    if shutil.which("valgrind") is None and shutil.which("apt-get") is not None:
        for command in (["update", "-qq"], ["install", "-y", "-qq", "valgrind"]):
            subprocess.run(["apt-get", *command], stdout=subprocess.DEVNULL)
    if shutil.which("valgrind") is None:
        raise CannotMeasure("gate: needs valgrind; install it with: apt-get install valgrind")


def write_records(path: Path) -> None:
    kernels = record.kernels()
    before = native.cpu().isa()
    native.cpu().set_isa(ISA)
    try:
        with record.recording(path) as recorder:
            for op, what, inputs in cases():
                if op in kernels:
                    recorder.label = f"{op}, {what}"
                    record.run(recorder, op, {n: v for n, v in inputs.items() if v is not None})
                    recorder.forget()
    finally:
        native.cpu().set_isa(before)


def read_counts(folder: Path) -> Counts:
    """Instructions by name from the profiles that the marks left."""
    counts: Counter[str] = Counter()
    for path in folder.glob("profile.*"):
        text = path.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
        total = re.search(r"^totals: (\d+)", text, re.M)
        if name and total:
            counts[name[1]] += int(total[1])
    return dict(counts)


def count() -> Counts:
    require_valgrind()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records")
        gates = ROOT / "tests" / "gates"
        marks = folder / "marks.so"
        flags = ["-shared", "-fPIC", "-O1", "-o", str(marks)]
        subprocess.run([*compiler(), str(gates / "marks.cpp"), *flags], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command.append(f"--callgrind-out-file={folder / 'profile'}")
        command += [sys.executable, "-I", "-S", str(gates / "replay.py"), str(extension(ROOT))]
        command += [str(folder / "records"), "--marks", str(marks)]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"gate: valgrind failed:\n{done.stdout}{done.stderr[-3000:]}")
        return read_counts(folder)


def counted() -> Counts:
    """Of this tree; large cases are refused, since everyone waits for them."""
    found = count()
    if large := [name for name, n in found.items() if n > MOST]:
        raise ValueError(f"gate: over {MOST:,} instructions, make them smaller: {large}")
    return found


def against_baseline(path: Path) -> int:
    after = counted()
    moves = compare(json.loads(path.read_text()), after, HELD)
    for moved in moves:
        print(moved)
    print(f"{len(moves)} of {len(after)} counts moved by more than {HELD:.0%}")
    if moves:
        print("gate: record what is meant with: make gate-update")
    return exits.REGRESSION if moves else exits.OK


def worse_than_base(before: Counts, after: Counts, recorded: set[str]) -> list[Moved]:
    """Cases of both revisions that got worse without a baseline recorded since that says so."""
    both = before.keys() & after.keys()
    moves = compare({n: before[n] for n in both}, {n: after[n] for n in both}, HELD)
    return [m for m in moves if m.change is not None and m.change > 0 and m.name not in recorded]


def against_base(asked: str | None) -> int:
    commit = base_revision.revision(ROOT, asked)
    print(f"gate: comparing with {commit[:12]}, compiled here with {compiler_key()}", flush=True)
    before, after = base_revision.count(ROOT, commit), counted()
    if not before.keys() & after.keys():
        raise CannotMeasure(f"gate: {commit[:12]} has none of these cases; name one with --base")
    for moved in compare(before, after, HELD):
        print(moved)
    worse = worse_than_base(before, after, base_revision.recorded_moves(ROOT, commit, FOLDER))
    print(f"{len(worse)} of {len(after)} counts more than {HELD:.0%} worse than {commit[:12]}")
    return exits.REGRESSION if worse else exits.OK


def update(path: Path) -> int:
    before: Counts = json.loads(path.read_text()) if path.exists() else {}
    after = counted()
    moves = compare(before, after, 0.0)
    for moved in moves:
        print(moved)
    if refused := unexplained(FOLDER, moves):
        files = "\n".join(f"  {why(FOLDER, m.name)}: {m}" for m in refused)
        print(f"gate: more than {REFUSED:.0%} worse without a file saying why:\n{files}")
        return exits.REGRESSION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    print(f"{path}: {len(after)} counts, {len(moves)} moved")
    return exits.OK


def gate(given: argparse.Namespace) -> int:
    path = FOLDER / f"{compiler_key()}.json"
    if given.update:
        return update(path)
    if path.exists() and given.base is None:
        return against_baseline(path)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json"))) or "no compiler"
        print(f"gate: no baseline for {compiler_key()}, only for {known}")
    return against_base(given.base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=exits.LEGEND)
    parser.add_argument("--update", action="store_true", help="record, and print what moved")
    parser.add_argument("--base", help="a revision to compare with in place of the baseline")
    sys.exit(exits.status(lambda: gate(parser.parse_args())))


if __name__ == "__main__":
    main()
