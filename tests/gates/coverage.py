"""Which lines of csrc the replayed calls run, by gcov over the build of MBM_SANITIZE=coverage.

At least LEAST of them must be run; UNREACHED names what no recorded call can reach, and why.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.gates.planting import ROOT

LEAST = 0.98
UNREACHED = ROOT / "tests" / "gates" / "unreached.json"

Counts = dict[str, dict[int, int]]  # by file below the root, by line


def tool(compiler: list[str]) -> str:
    """The gcov of this compiler: another version does not read its files."""
    found = subprocess.check_output([*compiler, "-print-prog-name=gcov"], text=True)
    return found.strip()


def clear(folder: Path) -> None:
    """Forgets what earlier runs counted."""
    for path in folder.rglob("*.gcda"):
        path.unlink()


def read(folder: Path, gcov: str) -> Counts:
    """Runs of each line, the most over the objects that hold it: a template has many."""
    counts: Counts = {}
    for notes in sorted(folder.rglob("*.gcno")):
        command = [gcov, "--json-format", "--stdout", str(notes)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for document in filter(None, said.stdout.splitlines()):
            merge(counts, json.loads(document)["files"])
    return counts


def merge(counts: Counts, files: Iterable[Mapping[str, object]]) -> None:
    for file in files:
        name = str(file["file"])
        if not name.startswith("csrc/"):
            continue
        mine = counts.setdefault(name, {})
        for line in file["lines"]:  # type: ignore[attr-defined]
            number = line["line_number"]
            mine[number] = max(mine.get(number, 0), line["count"])


def reasons(counts: Counts, unreached: Mapping[str, Mapping[str, str]], root: Path) -> Counts:
    """The counts without the lines whose text UNREACHED names.

    Raises:
        ValueError: it names a text that no line which was not run holds.
    """
    rest: Counts = {}
    for name, lines in counts.items():
        texts = (root / name).read_text().splitlines()
        named = unreached.get(name, {})
        left = {n: c for n, c in lines.items() if c or texts[n - 1].strip() not in named}
        rest[name] = left
        gone = {texts[n - 1].strip() for n in lines.keys() - left.keys()}
        if stale := [text for text in named if text not in gone]:
            raise ValueError(
                f"coverage: {UNREACHED.name}: {name}: got {stale[0]!r}, which runs or is gone; "
                "expected lines that no call runs; take it out"
            )
    return rest


def report(counts: Counts, root: Path = ROOT) -> tuple[float, list[str]]:
    """The share of lines that were run, and each one that was not."""
    total = sum(len(lines) for lines in counts.values())
    missed = []
    for name, lines in sorted(counts.items()):
        texts = (root / name).read_text().splitlines()
        missed += [f"{name}:{n}: {texts[n - 1].strip()}" for n, c in sorted(lines.items()) if not c]
    return 1 - len(missed) / max(total, 1), missed


def check(folder: Path, compiler: list[str]) -> list[str]:
    """A report where fewer lines than LEAST were run."""
    counts = reasons(read(folder, tool(compiler)), json.loads(UNREACHED.read_text()), ROOT)
    share, missed = report(counts)
    print("\n".join(f"not run  {line}" for line in missed))
    total = sum(len(lines) for lines in counts.values())
    print(f"{share:.2%} of {total} lines of csrc run, at least {LEAST:.0%} must", flush=True)
    return [] if share >= LEAST else [f"coverage: {share:.2%} of the lines, {LEAST:.0%} must run"]
