"""The compile-time gate: resources of every Triton kernel against a baseline of its triton.

benchmarks/static/<triton version>/<op>.json holds one entry for each compilation that differs:
"kernel | case | what differs between its launches there | dtype | constants warps stages | target".
"""

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
from mbm_kernels.bench.exits import CannotMeasure
from mbm_kernels.gate import cases, resources

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")
DEFAULT_TARGETS = ("sm_90", "gfx942")
HIGHER_IS_BETTER = ("matrix_instructions", "occupancy")
SPILLS = ("spill_stores", "spill_loads", "local_instructions")
# A metric may move this far by --update alone; further for the worse needs a reason.
FREE_MOVE = 0.05
BROKEN = "broken"  # in place of an entry's metrics: why it does not compile

Entry = dict[str, Any]
Job = tuple[str, str, str, bool, Path]


@dataclass(frozen=True)
class Move:
    """How one kernel differs from its baseline."""

    key: str
    verdict: str  # NEW, GONE, WORSE, BETTER, BROKEN
    metrics: tuple[tuple[str, float, float], ...] = ()  # name, before, now
    needs_reason: bool = False
    note: str = ""


@dataclass(frozen=True)
class Compilation:
    """A launch in one configuration for one target, under the key that no other one has."""

    key: str
    launch: triton_launch.Launch
    config: triton_launch.Config


def measure(
    ops: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[str],
    every_config: bool,
    cache: Path,
) -> dict[str, dict[str, Entry]]:
    """Of each operation the resources by key, sorted."""
    jobs: list[Job] = [
        (op, dtype, target, every_config, cache)
        for op in ops
        for dtype in dtypes
        for target in targets
    ]
    found: dict[str, dict[str, Entry]] = {op: {} for op in ops}
    workers = min(len(jobs), os.cpu_count() or 1)
    forks = get_context("forkserver")  # of a process that imports torch once for all of them
    forks.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=forks) as pool:
        for job, part in zip(jobs, pool.map(_measure_job, jobs), strict=True):
            found[job[0]] |= part
    return {op: dict(sorted(entries.items())) for op, entries in found.items()}


def _measure_job(job: Job) -> dict[str, Entry]:
    op, dtype, target, every_config, cache = job
    found: dict[str, Entry] = {}
    of = resources.TARGETS[target]
    for case in cases.of(op):
        launches = case.record(DTYPES[dtype])
        for each in compilations(case.name, launches, dtype, of, every_config):
            try:
                used = resources.resources(each.launch, each.config, of, cache)
                found[each.key] = asdict(used)
            except resources.DoesNotCompile as error:
                found[each.key] = {BROKEN: str(error)}
    return found


def compilations(
    case: str,
    launches: Sequence[triton_launch.Launch],
    dtype: str,
    target: resources.Target,
    every_config: bool,
) -> list[Compilation]:
    """The compilations that differ among one case's launches.

    Raises:
        RuntimeError: two that differ have one key, so that one would be measured for both.
    """
    found: dict[str, tuple[Compilation, Any]] = {}
    kernels: dict[str, list[triton_launch.Launch]] = {}
    for launch in launches:
        kernels.setdefault(launch.kernel.name, []).append(launch)
    for kernel, group in kernels.items():
        traits = [_traits(launch, target) for launch in group]
        for launch, its in zip(group, traits, strict=True):
            differing = " ".join(
                f"{name}={text}"
                for name, text in its.items()
                if any(other[name] != text for other in traits)
            )
            where = " | ".join(filter(None, (kernel, case, differing, dtype)))
            for config in _configs(launch, dtype, every_config):
                key = f"{where} | {_describe(config)} | {target.name}"
                identity = (its, config.constants, config.compile_options(target.nvidia))
                if key in found and found[key][1] != identity:
                    raise RuntimeError(f"gate: two compilations with one key: {key}")
                found[key] = (Compilation(key, launch, config), identity)
    return [compilation for compilation, _ in found.values()]


def _traits(launch: triton_launch.Launch, target: resources.Target) -> dict[str, str]:
    """Beside what its configuration says, which the key has anyway."""
    every = resources.specialise(launch, launch.config, target).traits()
    return {name: text for name, text in every.items() if name not in dict(launch.config.constants)}


def _describe(config: triton_launch.Config) -> str:
    constants = " ".join(f"{name}={value}" for name, value in config.constants)
    most = f" registers={config.max_registers}" if config.max_registers else ""
    return f"{constants} warps={config.num_warps} stages={config.num_stages}{most}"


def _configs(
    launch: triton_launch.Launch, dtype: str, every: bool
) -> Iterator[triton_launch.Config]:
    yield launch.config
    if every:
        for config in launch.kernel.configs:
            if config != launch.config and (not config.dtypes or dtype in config.dtypes):
                yield config


def baseline_path(folder: Path, versions: dict[str, str], op: str) -> Path:
    return folder / versions["triton"] / f"{op}.json"


def read_baseline(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "kernels": {}}


def check_baselines(folder: Path, versions: dict[str, str], ops: Sequence[str]) -> None:
    """Raises CannotMeasure where there is none of these versions to compare with."""
    missing = [op for op in ops if not baseline_path(folder, versions, op).exists()]
    if missing:
        recorded = sorted(path.name for path in folder.glob("[0-9]*") if path.is_dir())
        raise CannotMeasure(
            f"gate: {folder}: got no baseline of triton {versions['triton']} for "
            f"{', '.join(missing)}; expected one (there are those of "
            f"{', '.join(recorded) or 'no version'}); record it with --update"
        )
    for op in ops:
        path = baseline_path(folder, versions, op)
        if (recorded_by := read_baseline(path)["versions"]) != versions:
            raise CannotMeasure(
                f"gate: {path}: got triton and ptxas {versions}; expected those of the baseline, "
                f"{recorded_by}; install them (constraints.txt) or record anew with --update"
            )


def compare(before: dict[str, Entry], now: dict[str, Entry], *, whole: bool) -> list[Move]:
    """What moved; with `whole`, entries that were not measured again are GONE."""
    moves: list[Move] = []
    for key, entry in now.items():
        old = before.get(key)
        if BROKEN in entry:
            moves.append(Move(key, "BROKEN", note=entry[BROKEN]))
            continue
        if old is None:
            moves.append(Move(key, "NEW", needs_reason=any(entry[name] for name in SPILLS)))
            continue
        # What was not counted before counts as 0 then.
        changed = tuple((n, old.get(n, 0), v) for n, v in entry.items() if old.get(n) != v)
        if changed:
            worse = [c for c in changed if _worse(*c)]
            moves.append(
                Move(key, "WORSE" if worse else "BETTER", changed, any(_far(*c) for c in worse))
            )
    if whole:
        moves += [Move(key, "GONE") for key in before if key not in now]
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
    if broken := [move for move in moves if move.verdict == "BROKEN"]:
        raise RuntimeError(f"gate: not to be recorded: {describe(broken[0])}")
    kernels: dict[str, Any] = dict(baseline["kernels"])
    for move in moves:
        if move.verdict == "GONE":
            del kernels[move.key]
            continue
        kernels[move.key] = dict(now[move.key])
        if move.needs_reason:
            kernels[move.key]["because"] = because
    lines = [f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in sorted(kernels)]
    listed = ",\n".join(lines)
    text = f'{{\n "versions": {json.dumps(versions)},\n "kernels": {{\n{listed}\n }}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, text.encode())


def describe(move: Move) -> str:
    metrics = ", ".join(f"{name} {before:g} -> {now:g}" for name, before, now in move.metrics)
    said = metrics or move.note
    return f"{move.verdict:<6} {move.key}" + (f": {said}" if said else "")
