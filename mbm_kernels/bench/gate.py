"""The compile-time gate: resources of every Triton kernel against benchmarks/static/<op>.json."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mbm_kernels._core import files, triton_launch
from mbm_kernels.bench import static, static_cases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")
DEFAULT_TARGETS = ("sm_90", "gfx942")
HIGHER_IS_BETTER = ("matrix_instructions", "occupancy")
SPILLS = ("spill_stores", "spill_loads", "local_instructions")
# A metric may move this far by --update alone; further for the worse needs a reason.
FREE_MOVE = 0.05

Entry = dict[str, Any]


@dataclass(frozen=True)
class Move:
    """How one kernel differs from its baseline."""

    key: str
    verdict: str  # NEW, GONE, WORSE, BETTER
    metrics: tuple[tuple[str, float, float], ...]  # name, before, now
    needs_reason: bool


def measure(
    op: str, dtypes: Sequence[str], targets: Sequence[str], every_config: bool, cache: Path
) -> dict[str, Entry]:
    """Resources by "kernel case dtype constants target", sorted."""
    jobs = [(op, dtype, target, every_config, cache) for dtype in dtypes for target in targets]
    found: dict[str, Entry] = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for part in pool.map(_measure_job, jobs):
            found |= part
    return dict(sorted(found.items()))


def _measure_job(job: tuple[str, str, str, bool, Path]) -> dict[str, Entry]:
    op, dtype, target, every_config, cache = job
    found: dict[str, Entry] = {}
    for case in static_cases.of(op):
        for launch in case.record(DTYPES[dtype]):
            for config in _configs(launch, dtype, every_config):
                constants = " ".join(f"{n}={v}" for n, v in config.constants)
                key = (
                    f"{launch.kernel.name} | {case.name} | {dtype} | {constants}"
                    f" warps={config.num_warps} stages={config.num_stages} | {target}"
                )
                resources = static.resources(launch, config, static.TARGETS[target], cache)
                found[key] = asdict(resources)
    return found


def _configs(
    launch: triton_launch.Launch, dtype: str, every: bool
) -> Iterator[triton_launch.Config]:
    yield launch.config
    if every:
        for config in launch.kernel.configs:
            if config != launch.config and (not config.dtypes or dtype in config.dtypes):
                yield config


def read_baseline(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "kernels": {}}


def check_versions(baseline: dict[str, Any], versions: dict[str, str], path: Path) -> None:
    if baseline["kernels"] and baseline["versions"] != versions:
        raise ValueError(
            f"gate: {path}: got triton and ptxas {versions}; expected those of the baseline, "
            f"{baseline['versions']}; install them (constraints.txt) or record anew with --update"
        )


def compare(before: dict[str, Entry], now: dict[str, Entry], *, whole: bool) -> list[Move]:
    """What moved; with `whole`, entries that were not measured again are GONE."""
    moves: list[Move] = []
    for key, entry in now.items():
        old = before.get(key)
        if old is None:
            moves.append(Move(key, "NEW", (), any(entry[name] for name in SPILLS)))
            continue
        changed = tuple((n, old[n], v) for n, v in entry.items() if old[n] != v)
        if changed:
            worse = [c for c in changed if _worse(*c)]
            moves.append(
                Move(key, "WORSE" if worse else "BETTER", changed, any(_far(*c) for c in worse))
            )
    if whole:
        moves += [Move(key, "GONE", (), False) for key in before if key not in now]
    return moves


def _worse(name: str, before: float, now: float) -> bool:
    return now < before if name in HIGHER_IS_BETTER else now > before


def _far(name: str, before: float, now: float) -> bool:
    """Spills from none, or more than FREE_MOVE of what was."""
    return abs(now - before) > FREE_MOVE * abs(before)


def update(
    path: Path,
    baseline: dict[str, Any],
    now: dict[str, Entry],
    moves: list[Move],
    versions: dict[str, str],
    because: str | None,
) -> None:
    """Records `now`; an entry keeps the reason it was given until its figures move again."""
    refused = [move for move in moves if move.needs_reason]
    if refused and not because:
        listed = "\n  ".join(describe(move) for move in refused)
        raise ValueError(
            f"gate: got {len(refused)} kernels that spill or are over 5 % worse; expected a reason "
            f"for them; give it with --because 'text', or mend them:\n  {listed}"
        )
    kernels: dict[str, Any] = dict(baseline["kernels"])
    for move in moves:
        if move.verdict == "GONE":
            del kernels[move.key]
            continue
        kernels[move.key] = dict(now[move.key])
        if move.needs_reason:
            kernels[move.key]["because"] = because
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": versions, "kernels": dict(sorted(kernels.items()))}, indent=1)
    files.write_atomic(path, (text + "\n").encode())


def describe(move: Move) -> str:
    metrics = ", ".join(f"{name} {before:g} -> {now:g}" for name, before, now in move.metrics)
    return f"{move.verdict:<6} {move.key}" + (f": {metrics}" if metrics else "")
