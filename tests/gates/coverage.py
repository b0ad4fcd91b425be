"""Which lines of csrc the replayed calls run, by gcov over the build of MBM_SANITIZE=coverage, and
which sizes of its kernels: a line of a template runs where any of its instances runs it.

At least LEAST of both must be run; UNREACHED names what no recorded call can reach, and why.
"""

import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.gates.planting import ROOT

LEAST = 0.98
UNREACHED = ROOT / "tests" / "gates" / "unreached.json"

Counts = dict[str, dict[int, int]]  # by file below the root, by line
Instances = dict[str, dict[str, int]]  # by file, by name: of templates with nothing but numbers
_LITERAL = r"(?:-?\d+|true|false)"
_INSTANCE = re.compile(rf"(\w+<{_LITERAL}(?:, {_LITERAL})*>)\([^)]*\)$")


def tool(compiler: list[str]) -> str:
    """The gcov of this compiler: another version does not read its files."""
    found = subprocess.check_output([*compiler, "-print-prog-name=gcov"], text=True)
    return found.strip()


def clear(folder: Path) -> None:
    """Forgets what earlier runs counted, and objects of sources that are gone."""
    for path in folder.rglob("*.gcda"):
        path.unlink()
    for build in folder.rglob("build.ninja"):
        built = build.read_text()
        for path in build.parent.glob("*.gcno"):
            if f"{path.stem}.o:" not in built:
                path.unlink()


def read(folder: Path, gcov: str) -> tuple[Counts, Instances]:
    """Runs of each line, the most over the objects that hold it, and of each instance."""
    counts: Counts = {}
    instances: Instances = {}
    for notes in sorted(folder.rglob("*.gcno")):
        command = [gcov, "--json-format", "--stdout", str(notes)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for document in filter(None, said.stdout.splitlines()):
            files = json.loads(document)["files"]
            merge(counts, files)
            merge_instances(instances, files)
    return counts, instances


def merge(counts: Counts, files: Iterable[Mapping[str, object]]) -> None:
    for file in files:
        name = str(file["file"])
        if not name.startswith("csrc/"):
            continue
        mine = counts.setdefault(name, {})
        for line in file["lines"]:  # type: ignore[attr-defined]
            number = line["line_number"]
            mine[number] = max(mine.get(number, 0), line["count"])


def merge_instances(instances: Instances, files: Iterable[Mapping[str, object]]) -> None:
    for file in files:
        name = str(file["file"])
        for function in file["functions"]:  # type: ignore[attr-defined]
            found = _INSTANCE.search(function["demangled_name"])
            if found and name.startswith("csrc/"):
                mine = instances.setdefault(name, {})
                mine[found[1]] = max(mine.get(found[1], 0), function["execution_count"])


def reasons(
    counts: Counts, instances: Instances, unreached: Mapping[str, Mapping[str, str]], root: Path
) -> tuple[Counts, Instances]:
    """Both without what UNREACHED names: the texts of lines, and instances.

    Raises:
        ValueError: it names what runs, or what is gone.
    """
    lines, kernels = dict(counts), dict(instances)
    for name, named in unreached.items():
        texts = (root / name).read_text().splitlines()
        of_lines = {n: texts[n - 1].strip() for n, c in counts.get(name, {}).items() if not c}
        of_kernels = [what for what, c in instances.get(name, {}).items() if not c]
        if stale := named.keys() - {*of_lines.values(), *of_kernels}:
            raise ValueError(
                f"coverage: {UNREACHED.name}: {name}: got {min(stale)!r}, which runs or is gone; "
                "expected what no call runs; take it out"
            )
        left = {n: c for n, c in counts.get(name, {}).items() if of_lines.get(n) not in named}
        lines[name] = left
        kernels[name] = {w: c for w, c in instances.get(name, {}).items() if w not in named}
    return lines, kernels


def report(counts: Counts, root: Path = ROOT) -> tuple[float, list[str]]:
    """The share of lines that were run, and each one that was not."""
    total = sum(len(lines) for lines in counts.values())
    missed = []
    for name, lines in sorted(counts.items()):
        texts = (root / name).read_text().splitlines()
        missed += [f"{name}:{n}: {texts[n - 1].strip()}" for n, c in sorted(lines.items()) if not c]
    return 1 - len(missed) / max(total, 1), missed


def report_instances(instances: Instances) -> tuple[float, list[str]]:
    """The share of instances that were run, and each one that was not."""
    total = sum(len(mine) for mine in instances.values())
    missed = [f"{name}: {what}" for name, mine in sorted(instances.items())
              for what, count in sorted(mine.items()) if not count]  # fmt: skip
    return 1 - len(missed) / max(total, 1), missed


def check(folder: Path, compiler: list[str]) -> list[str]:
    """Reports where fewer lines or instances than LEAST were run, or UNREACHED is not true."""
    named, found = json.loads(UNREACHED.read_text()), []
    counts, instances = read(folder, tool(compiler))
    try:
        counts, instances = reasons(counts, instances, named, ROOT)
    except ValueError as stale:
        found.append(str(stale))
    for what, things, (share, missed) in (
        ("lines", counts, report(counts)),
        ("instances of kernels", instances, report_instances(instances)),
    ):
        print("\n".join(f"not run  {each}" for each in missed))
        total = sum(len(mine) for mine in things.values())
        print(f"{share:.2%} of {total} {what} of csrc run, at least {LEAST:.0%} must", flush=True)
        if share < LEAST:
            found.append(f"coverage: {share:.2%} of the {what}, {LEAST:.0%} must run")
    return found
