"""Runs a benchmark: right results first, then interleaved times, one row a case and pass."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from mbm_kernels.bench import limits, machine, memory, timing
from mbm_kernels.bench.benchmark import (
    Benchmark,
    Case,
    Prepared,
    prepare,
    watch,
)
from mbm_kernels.bench.correct import WrongResult, check
from mbm_kernels.bench.results import Row
from mbm_kernels.bench.statistics import Summary, paired_ratio

MBM = "mbm"


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    seconds: of sampling for a row; at least `timing.MIN_ROUNDS` rounds are taken.
    """

    threads: Sequence[int] = (2, 1)
    seconds: float = 2.5
    min_rounds: int = timing.MIN_ROUNDS
    backend: str = "auto"
    compile: bool = True
    quick: bool = False


QUICK_SECONDS = 0.5


def run(
    benchmark: Benchmark,
    cases: Sequence[Case],
    settings: Settings,
    started: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """The rows as they come; a row with `wrong` has no times."""
    for case in cases:
        for which in case.passes:
            started(f"{benchmark.op} {case.label} {which}: checking")
            with timing.threads(settings.threads[0]):
                # A smaller case might be dispatched elsewhere: check the backend that is timed.
                backends = watch(benchmark, case, which, settings.backend).backends
                backend = backends.get(benchmark.op, settings.backend)
                outcome: Row
                try:
                    shares = check(benchmark, case, which, backend)
                    outcome = {"error_of_budget": max(shares.values(), default=0.0)}
                except WrongResult as error:
                    outcome = {"wrong": str(error)}
            for count in settings.threads:
                started(f"{benchmark.op} {case.label} {which}: timing, threads {count}")
                with timing.threads(count):
                    row = _head(benchmark, case, which, settings, backends) | outcome
                    if "wrong" not in row:
                        row |= _measure(benchmark, case, which, settings)
                yield row


def _head(
    benchmark: Benchmark, case: Case, which: str, settings: Settings, backends: dict[str, str]
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
        "backend": backend_name(benchmark.op, backends),
        "backends": backends,
        "quick": settings.quick,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": machine.load(),
    }


def _measure(benchmark: Benchmark, case: Case, which: str, settings: Settings) -> Row:
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
    times = timing.interleave(calls, settings.seconds, min_rounds=settings.min_rounds)
    summaries = {name: Summary.of(t) for name, t in times.items()}
    stock = [name for name in times if name != MBM]
    best = min(stock, key=lambda name: summaries[name].median_ms)
    ratio = paired_ratio(times[best], times[MBM])
    row: Row = {
        "forms": {name: summary.as_dict() for name, summary in summaries.items()},
        "unavailable": failed,
        "stock_form": best,
        "mbm_ms": summaries[MBM].median_ms,
        "stock_ms": summaries[best].median_ms,
        "ratio": ratio.value,
        "ratio_lo": ratio.low,
        "ratio_hi": ratio.high,
        "verdict": ratio.verdict(),
        "ratios": {name: paired_ratio(times[name], times[MBM]).value for name in stock},
        # After the timing, since it trims the heap.
        "peak_extra_bytes": {name: memory.peak_extra_bytes(calls[name]) for name in (MBM, best)},
        "result_bytes": {name: memory.result_bytes(calls[name]()) for name in (MBM, best)},
    }
    if benchmark.work is not None:
        work = benchmark.work(case, which)
        limit = limits.measure(torch.get_num_threads())
        least, bound = limit.least_seconds(work)
        row["limit"] = {
            "bound": bound,
            "share": least * 1e3 / summaries[MBM].median_ms,
            "operations": work.operations,
            "bytes": work.bytes,
            "operations_per_s": limit.operations_per_s,
            "bytes_per_s": limit.bytes_per_s,
            "source": limit.source,
        }
    return row


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
