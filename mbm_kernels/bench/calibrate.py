"""`mbm-kernels calibrate`: fits the constants by which "auto" chooses on this CPU."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mbm_kernels._core import cost, dispatch, native, processor
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import isa, machine
from mbm_kernels.bench.cost_fit import Fit
from mbm_kernels.bench.drawn import DRAWS
from mbm_kernels.bench.drawn_times import Timed, measured

INFERENCE_ONLY = ("linear_topk",)


def check_machine() -> None:
    """Raises RuntimeError where constants of this process would say nothing about the CPU."""
    if native.isa() not in cost.LANES:
        raise RuntimeError(
            f"calibrate: got the code path {native.isa()}, expected one of {sorted(cost.LANES)}; "
            "'auto' takes PyTorch without it"
        )
    isa.check(isa.record())


def fit(rows: Sequence[Timed]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and margins by operation and pass, of all operations that rows are of."""
    constants: dict[str, Any] = {}
    margins: dict[str, Any] = {}
    here = cost.machine_sizes()
    for op in dict.fromkeys(r.op for r in rows):
        for which in ("inference", "training"):
            some = [r for r in rows if r.op == op and r.training == (which == "training")]
            if not some:
                continue
            found = Fit(op, some, here)
            constants.setdefault(op, {})[which] = {b: found.constants(b) for b in cost.BACKENDS}
            margins.setdefault(op, {})[which] = found.margins()
    return constants, margins


def content(rows: Sequence[Timed], kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file of constants from timed problems; of operations without rows, what `kept` holds."""
    constants, margins = fit(rows)
    before = kept or {"constants": {}, "margins": {}, "problems": {}}
    problems = {op: sum(r.op == op for r in rows) for op in constants}
    return {
        "schema": cost.SCHEMA,
        "device": processor.name(),
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": machine.facts()["versions"],
        "machine": cost.machine_sizes(),
        "rates": asdict(processor.measured_rates()),
        "problems": {**before["problems"], **problems},
        "constants": {**before["constants"], **constants},
        "margins": {**before["margins"], **margins},
    }


def write(path: Path, found: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
    dispatch.reload()


def read_rows(path: Path) -> list[Timed]:
    """Timed problems from JSON Lines, whose first line may be facts of the machine."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Timed(**row) for row in rows if "op" in row]


def time_all(ops: Sequence[str], seconds: float, seed: int, note: Any) -> list[Timed]:
    """Timed problems of each operation, `note` being told (row, count of its operation) of each."""
    rows = []
    for op in ops:
        for count, row in enumerate(measured(op, seed=seed, seconds=seconds), 1):
            rows.append(row)
            note(row, count)
    return rows


def quality(rows: Sequence[Timed], table: cost.Table) -> dict[str, dict[str, float]]:
    """For each operation: problems, wins of the kernel, time lost by "auto" against always choosing
    right, and the least ratio of PyTorch's time to what "auto" takes over 100 us."""
    found = {}
    for op in dict.fromkeys(r.op for r in rows):
        some = [r for r in rows if r.op == op]
        taken = [(r, chosen_ns(r, table)) for r in some]
        best = sum(min(r.cpu_ns, r.torch_ns) for r in some)
        long = [r.torch_ns / t for r, t in taken if max(r.torch_ns, t) > 1e5]
        found[op] = {
            "problems": len(some),
            "kernel_wins": sum(r.cpu_ns < r.torch_ns for r in some) / len(some),
            "taken": sum(t == r.cpu_ns for r, t in taken) / len(some),
            "regret": sum(t for _, t in taken) / best - 1,
            "over_torch": sum(r.torch_ns for r in some) / sum(t for _, t in taken),
            "best_over_torch": sum(r.torch_ns for r in some) / best,
            "least_ratio": min(long, default=math.nan),
            "below": sum(x < 0.92 for x in long),
        }
    return found


def chosen_ns(row: Timed, table: cost.Table) -> float:
    """The time of what "auto" takes."""
    sizes = {**row.sizes, "training": int(row.training)}
    found = table.predict(row.op, sizes, row.threads)
    return row.cpu_ns if found is not None and found.kernel_wins else row.torch_ns


__all__ = ["DRAWS", "check_machine", "content", "quality", "read_rows", "time_all", "write"]
