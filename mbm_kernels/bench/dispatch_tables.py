"""`make dispatch RESULTS=file`: the rows of a results file as rules of ops/<op>/dispatch.json.

A rule's box spans the sizes of rows that win, grown only while no row that does not win lies in it;
nothing beyond what was measured is claimed. The file's own backend and device replace what the
table said of them; other rules stay.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbm_kernels._core import dispatch
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import results
from mbm_kernels.bench.benchmark import FORWARD

Row = results.Row
WINS = 1.0  # the lower end of the ratio's interval
GPU_BACKENDS = ("triton", "cuda")


@dataclass(frozen=True)
class Point:
    """One measured shape: the sizes that dispatch judges it by, and whether every row of it won."""

    sizes: tuple[tuple[str, int], ...]
    wins: bool


Box = dict[str, tuple[int, int]]


def points(rows: Iterable[Row]) -> list[Point]:
    """One for each shape; it wins if all its rows do: hot and cold, every time it was measured."""
    found: dict[tuple[tuple[str, int], ...], bool] = {}
    for row in rows:
        key = tuple(sorted(row["dispatch_sizes"].items()))
        wins = row.get("ratio_lo", 0.0) > WINS
        found[key] = found.get(key, True) and wins
    return [Point(key, wins) for key, wins in found.items()]


def inside(box: Box, point: Point) -> bool:
    return all(low <= dict(point.sizes)[name] <= high for name, (low, high) in box.items())


def boxes(measured: Sequence[Point]) -> list[Box]:
    """Disjoint in what they claim: each winner is in one, and no loser in any."""
    losers = [p for p in measured if not p.wins]
    found: list[Box] = []
    for point in (p for p in measured if p.wins):
        sizes = dict(point.sizes)
        for box in found:
            grown = {n: (min(lo, sizes[n]), max(hi, sizes[n])) for n, (lo, hi) in box.items()}
            if not any(inside(grown, loser) for loser in losers):
                box.update(grown)
                break
        else:
            found.append({name: (size, size) for name, size in sizes.items()})
    return found


def rules(op: str, rows: Sequence[Row], source: str) -> list[dict[str, Any]]:
    """The rules that these rows of one operation support, by backend, dtype and pass."""
    found = []
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["backend"] in GPU_BACKENDS:
            groups.setdefault((row["backend"], row["dtype"], row["pass"]), []).append(row)
    for (backend, dtype, which), group in sorted(groups.items()):
        training = int(which != FORWARD)
        for box in boxes(points(group)):
            where = {name: list(interval) for name, interval in box.items()}
            found.append(
                {
                    "backend": backend,
                    "device": "cuda",
                    "dtypes": [dtype],
                    "where": {**where, "training": [training, training]},
                    "results": source,
                }
            )
    return found


def update(op: str, rows: Sequence[Row], source: str, folder: Path = dispatch.OPS_FOLDER) -> int:
    """Writes the operation's table anew; the number of rules for GPUs in it."""
    path = folder / op / "dispatch.json"
    table = json.loads(path.read_text()) if path.exists() else {"rules": []}
    new = rules(op, rows, source)
    kept = [rule for rule in table["rules"] if rule["backend"] not in GPU_BACKENDS]
    write_atomic(path, (json.dumps({"rules": kept + new}, indent=2) + "\n").encode())
    return len(new)


def main(path: Path) -> int:
    """Every operation of the file that has rows of a GPU backend and chooses by its own sizes."""
    rows = results.read(path)["rows"]
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("backend") in GPU_BACKENDS and row.get("dispatch_sizes"):
            by_op.setdefault(row["op"], []).append(row)
    if not by_op:
        raise ValueError(
            f"dispatch: got {path}, without a row of triton or cuda; expected the file that "
            f"make gpu-check wrote; run that on a machine with a GPU first"
        )
    for op, group in sorted(by_op.items()):
        dispatch.check_op(op)
        print(f"{op}: {update(op, group, str(path))} rules")
    return 0


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("dispatch: expected one results file; give it as RESULTS=file")
        sys.exit(main(Path(sys.argv[1])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
