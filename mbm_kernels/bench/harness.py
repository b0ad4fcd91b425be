"""Runs a benchmark: right results first, then interleaved times, one row a case and pass.

A row is of one process or of several (processes.py): `sample` times every form in the process that
calls it, `row_of` makes a row of what one or more processes found.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from mbm_kernels import engines
from mbm_kernels._core import timing
from mbm_kernels.bench import limits, machine, memory, statistics
from mbm_kernels.bench.benchmark import (
    FORWARD,
    Benchmark,
    Case,
    Prepared,
    Watched,
    prepare,
    watch,
)
from mbm_kernels.bench.correct import WrongResult, check
from mbm_kernels.bench.results import Row
from mbm_kernels.bench.samples import pack
from mbm_kernels.bench.statistics import Summary, Times

MBM = "mbm"
AGAIN = "mbm again"  # mbm beside itself in the same rounds: what the machine alone makes of a ratio
QUICK_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Args:
        seconds: of sampling for a row in each process; at least `min_rounds` rounds are taken.
        processes: that a row's times come from.
        attempts: how often a row is measured until nothing speaks against it.
        peers: whether inference engines are timed in the same rounds.
    """

    threads: Sequence[int] = (2, 1)
    seconds: float = 2.5
    min_rounds: int = timing.MIN_ROUNDS
    backend: str = "auto"
    compile: bool = True
    quick: bool = False
    processes: int = 1
    attempts: int = 1
    peers: bool = False


def published(settings: Settings, processes: int) -> Settings:
    """For rows to publish: more processes, and less of each."""
    seconds = settings.seconds * 0.24  # 0.6 s of the usual 2.5
    return replace(settings, seconds=seconds, min_rounds=5, processes=processes, attempts=2)


@dataclass
class Sampled:
    """What one process found of a case.

    Args:
        times: of each form, [rounds], nanoseconds per call.
        unavailable: forms that do not compile, and why.
        load: cores that the rest of the machine took meanwhile.
        peak_extra_bytes, result_bytes: of each form; empty where they were not asked for.
        engines: of each one that was timed, its version, and its error if that was asked for.
        no_engines: the others, and why.
        errors: of mbm and PyTorch's forms against float64, where engines were timed.
    """

    times: dict[str, Times]
    unavailable: dict[str, str]
    load: float | None
    peak_extra_bytes: dict[str, int | None]
    result_bytes: dict[str, int]
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    no_engines: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "times": {n: t.tolist() for n, t in self.times.items()}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Sampled":
        times = {name: np.array(t) for name, t in found["times"].items()}
        return cls(**{**found, "times": times})


Source = Callable[[Benchmark, Case, str, Settings], Sequence[Sampled]]


def here(benchmark: Benchmark, case: Case, which: str, settings: Settings) -> Sequence[Sampled]:
    """The source of rows that are measured in this process."""
    return [sample(benchmark, case, which, settings)]


def run(
    benchmark: Benchmark,
    cases: Sequence[Case],
    settings: Settings,
    started: Callable[[str], None] = lambda what: None,
    source: Source = here,
) -> Iterator[Row]:
    """The rows as they come; a row with `wrong` has no times."""
    for case in cases:
        for which in case.passes:
            started(f"{benchmark.op} {case.label} {which}: checking")
            with timing.threads(settings.threads[0]):
                # A smaller case might be dispatched elsewhere: check the backend that is timed.
                watched = watch(benchmark, case, which, settings.backend)
                backend = watched.backends.get(benchmark.op, settings.backend)
                outcome: Row
                try:
                    shares = check(benchmark, case, which, backend)
                    outcome = {"error_of_budget": max(shares.values(), default=0.0)}
                except WrongResult as error:
                    outcome = {"wrong": str(error)}
            for count in settings.threads:
                with timing.threads(count):
                    row = _head(benchmark, case, which, settings, watched) | outcome
                    for attempt in range(settings.attempts):
                        if "wrong" in row or (attempt and not row["doubts"]):
                            break
                        again = ", again" if attempt else ""
                        started(
                            f"{benchmark.op} {case.label} {which}: timing, threads {count}{again}"
                        )
                        found = source(benchmark, case, which, settings)
                        row |= row_of(found) | _limit(benchmark, case, which, found)
                        row["doubts"] = doubts(row, found)
                        row["verdict"] = statistics.AMBG if row["doubts"] else _verdict(row)
                yield row


def _head(
    benchmark: Benchmark, case: Case, which: str, settings: Settings, watched: Watched
) -> Row:
    return {
        "op": benchmark.op,
        "case": case.label,
        "sizes": case.sizes,
        "options": {name: str(value) for name, value in case.options.items()},
        "pass": which,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "heap": machine.heap(),
        "backend_asked": settings.backend if benchmark.function is None else "auto",
        "backend": backend_name(benchmark.op, watched.backends),
        "backends": watched.backends,
        "dispatch_sizes": watched.sizes.get(benchmark.op, {}),
        "quick": settings.quick,
        "compiled": settings.compile,
        "n_processes": settings.processes,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sample(
    benchmark: Benchmark,
    case: Case,
    which: str,
    settings: Settings,
    *,
    seed: int = 0,
    details: bool = True,
) -> Sampled:
    """Times every form in this process, on its present number of threads.

    details: also takes what one process tells for all, memory and errors.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes 3 s to import
        torch._dynamo.reset()  # compiled code of another thread count or case
    inputs = benchmark.inputs(case)
    diff = benchmark.differentiable(inputs)
    forms = {n: f for n, f in benchmark.stock(case).items() if which in f.passes}
    if not settings.compile:
        forms = {n: f for n, f in forms.items() if not f.compile}
    prepared: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    for name, form in {MBM: benchmark.mbm(settings.backend), **forms}.items():
        prepared[name] = prepare(form, inputs, diff)
        if form.compile and (reason := call_fails(prepared[name], which)):
            failed[name] = reason
            del prepared[name]
    calls = {name: p.call(which) for name, p in prepared.items()}
    peers = engines.Sessions()
    errors: dict[str, float] = {}
    if settings.peers:
        outputs = {name: p.forward for name, p in prepared.items()} if details else {}
        peers, errors = peers_of(benchmark, case, which, settings, outputs)
    # What PyTorch makes of the model by its compiler takes part in PyTorch's comparisons.
    calls |= {n: c for n, c in peers.calls().items() if peers.measured[n].pytorch}
    others = machine.Others()
    times = timing.interleave(
        calls | {AGAIN: calls[MBM]} | peers.calls(),
        settings.seconds,
        seed=seed,
        min_rounds=settings.min_rounds,
        settle_seconds=timing.SETTLE_SECONDS if peers.built else 0.0,
    )
    load = others.cores()
    # After the timing, since it trims the heap.
    peaks = {n: memory.peak_extra_bytes(call) for n, call in calls.items() if details}
    sizes = {n: memory.result_bytes(call()) for n, call in calls.items() if details}
    found = {name: asdict(measured) for name, measured in peers.measured.items()}
    return Sampled(times, failed, load, peaks, sizes, found, peers.missing, errors)


def peers_of(
    benchmark: Benchmark,
    case: Case,
    which: str,
    settings: Settings,
    outputs: Mapping[str, Callable[[], Any]],
) -> tuple[engines.Sessions, dict[str, float]]:
    """The engines that run a case, and the errors of other forms against the same truth.

    Args:
        outputs: of those forms; where there are none, no errors are taken.
    """
    model = benchmark.engine_model(case) if which == FORWARD else "engines only infer"
    if isinstance(model, str):
        return engines.Sessions(missing=dict.fromkeys(engines.ENGINES, model)), {}
    truth = model.truth() if outputs else None
    found = engines.sessions(model, truth, compiled=settings.compile)
    if truth is None:
        return found, {}
    return found, {
        name: engines.relative_error(engines.flat(call()), truth) for name, call in outputs.items()
    }


def row_of(found: Sequence[Sampled]) -> Row:
    """What a row says of the times of one or more processes."""
    # A form that failed in one of them is in none.
    names = [n for n in found[0].times if all(n in process.times for process in found)]
    times = {name: [process.times[name] for process in found] for name in names}
    summaries = {name: Summary.over(each) for name, each in times.items()}
    foreign = {n for n, measured in found[0].engines.items() if not measured["pytorch"]}
    stock = [name for name in names if name not in (MBM, AGAIN, *foreign)]
    best = min(stock, key=lambda name: summaries[name].median_ms)
    ratios = {name: statistics.ratio_over(times[name], times[MBM]) for name in stock}
    loads = [process.load for process in found if process.load is not None]
    itself = statistics.ratio_over(times[AGAIN], times[MBM])
    return {
        "forms": {n: summary.as_dict() for n, summary in summaries.items() if n not in foreign},
        "unavailable": {n: why for process in found for n, why in process.unavailable.items()},
        "stock_form": best,
        "mbm_ms": summaries[MBM].median_ms,
        "stock_ms": summaries[best].median_ms,
        "ratio": ratios[best].value,
        "ratio_lo": ratios[best].low,
        "ratio_hi": ratios[best].high,
        "floor": itself.floor(),
        "ratios": {name: ratio.value for name, ratio in ratios.items()},
        "load": round(sum(loads) / len(loads), 3) if loads else None,
        "n_processes": len(found),
        "peak_extra_bytes": found[0].peak_extra_bytes,
        "result_bytes": found[0].result_bytes,
        "samples": pack(times),
    } | _engines(found, times)


def _engines(found: Sequence[Sampled], times: Mapping[str, Sequence[Times]]) -> Row:
    """Each engine's figures, and which is the fastest; nothing where none was asked for.

    The fastest is one of those that are not PyTorch.
    """
    missing = {n: why for process in found for n, why in process.no_engines.items()}
    timed = {n: measured for n, measured in found[0].engines.items() if n in times}
    if not (missing or timed):
        return {}
    rows = {}
    for name, measured in timed.items():
        ratio = statistics.ratio_over(times[name], times[MBM])
        rows[name] = {
            **measured,
            "ms": Summary.over(times[name]).median_ms,
            "ratio": ratio.value,
            "ratio_lo": ratio.low,
            "ratio_hi": ratio.high,
        }
    foreign = [name for name, row in rows.items() if not row["pytorch"]]
    fastest = min(foreign, key=lambda name: rows[name]["ms"], default=None)
    return {
        "engines": rows,
        "no_engines": missing,
        "engine": fastest,
        "engine_ratio": rows[fastest]["ratio"] if fastest is not None else None,
        "errors": found[0].errors,
    }


def _verdict(row: Row) -> str:
    return statistics.Ratio(row["ratio"], row["ratio_lo"], row["ratio_hi"]).verdict(row["floor"])


def doubts(row: Row, found: Sequence[Sampled]) -> list[str]:
    """What speaks against the row's times; it has no verdict then."""
    said = []
    if row["floor"] > statistics.MOST_FLOOR:
        said.append(f"mbm beside itself differs by up to {row['floor']:.0%}")
    for name in row["forms"]:
        spread = statistics.spread([process.times[name] for process in found])
        if spread > statistics.MOST_SPREAD:
            said.append(f"{name}: p80 / p20 is {spread:.1f}")
    share = row.get("limit", {}).get("share", 0.0)
    if share > statistics.MOST_SHARE:
        said.append(f"{share:.0%} of the {row['limit']['bound']} limit, which nothing exceeds")
    return said


def _limit(benchmark: Benchmark, case: Case, which: str, found: Sequence[Sampled]) -> Row:
    if benchmark.work is None:
        return {}
    work = benchmark.work(case, which)
    limit = limits.measure(torch.get_num_threads())
    least, bound = limit.least_seconds(work)
    milliseconds = Summary.over([process.times[MBM] for process in found]).median_ms
    return {
        "limit": {
            "bound": bound,
            "share": least * 1e3 / milliseconds,
            "operations": work.operations if work.fewest is None else work.fewest,
            "bytes": work.bytes,
            "operations_per_s": limit.operations_per_s,
            "bytes_per_s": limit.last_bytes_per_s if bound == "cache" else limit.bytes_per_s,
            "source": limit.source,
        }
    }


def backend_name(op: str, backends: dict[str, str]) -> str:
    """The backend of an operation's row; of a model's, all that its operations use."""
    return backends.get(op) or "+".join(sorted(set(backends.values()))) or "none"


def call_fails(prepared: Prepared, which: str) -> str | None:
    """Makes a first call, which compiles what there is to compile; why it fails, in a line."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        prepared.call(which)()
    except Exception as error:  # Dynamo and Inductor raise their own kinds, and compilers fail
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:200]}"
    return None


def eager_calls(
    benchmark: Benchmark, case: Case, which: str, backend: str = "auto"
) -> dict[str, Callable[[], Any]]:
    """mbm and the eager stock forms, for other tools that time functions."""
    inputs = benchmark.inputs(case)
    diff = benchmark.differentiable(inputs)
    forms = {n: f for n, f in benchmark.stock(case).items() if which in f.passes and not f.compile}
    chosen = {MBM: benchmark.mbm(backend), **forms}
    return {name: prepare(form, inputs, diff).call(which) for name, form in chosen.items()}
