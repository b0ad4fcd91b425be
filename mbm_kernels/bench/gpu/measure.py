"""Benchmarks on a CUDA device: the same rows as on a CPU, timed by events and by graph replay.

Each form is timed as it is called (host overhead included where the device waits for it) and, where
it can be captured, as a replayed CUDA graph; each with the inputs in the L2 cache ("hot": calls in
a row) and without ("cold": the cache is overwritten before each call).

Some failures stay with a process: a fault in a kernel, and before torch 2.12 a capture that breaks
off. `lasting` finds them; measuring goes on in another process (check.py).
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from mbm_kernels import engines
from mbm_kernels._core import dispatch, timing
from mbm_kernels.bench import memory
from mbm_kernels.bench.benchmark import (
    Benchmark,
    Case,
    Inputs,
    Prepared,
    prepare,
    watch,
)
from mbm_kernels.bench.correct import WrongResult, check
from mbm_kernels.bench.harness import MBM, backend_name, call_fails
from mbm_kernels.bench.limits import DTYPES, Limits, Work, in_dtype
from mbm_kernels.bench.results import Row
from mbm_kernels.bench.statistics import Summary, paired_ratio
from mbm_kernels.testing.inputs import map_floating
from mbm_kernels.testing.suite import placed

GRAPH = ", graph"
WARM_UPS = 3  # before a capture: cuBLAS workspaces, compilation, autotuning


@dataclass(frozen=True)
class GpuSettings:
    """seconds: of sampling for a row; a case, pass and dtype has two, hot and cold."""

    dtypes: Sequence[str] = ("bfloat16", "float32")
    seconds: float = 0.4
    min_rounds: int = 7
    backend: str = "auto"
    compile: bool = True


def placer(dtype: torch.dtype, device: torch.device) -> Callable[[Inputs], Inputs]:
    """Inputs on the device, floats in the dtype; lengths stay where they are, on the CPU."""

    def place(inputs: Inputs) -> Inputs:
        return placed(map_floating(inputs, lambda x: x.to(dtype)), device)

    return place


def run(
    benchmark: Benchmark,
    cases: Sequence[Case],
    settings: GpuSettings,
    device: torch.device | None = None,
) -> Iterator[Row]:
    """The rows as they come; a row with `wrong` or `failed` has no times.

    A model's operations take `settings.backend` too, since no table names it before a measurement.

    Raises:
        LastingError: after the row whose failure stays with this process.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    for case in cases:
        for which in case.passes:
            for dtype in settings.dtypes:
                with dispatch.preferring(settings.backend):
                    rows = list(_rows(benchmark, case, which, dtype, device, settings))
                yield from rows
                gc.collect()
                if reason := lasting():
                    raise LastingError(reason)


class LastingError(RuntimeError):
    """This process can use its device no more."""


def lasting() -> str | None:
    """What would fail every row to come, after freeing what the last one left."""
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def checked(benchmark: Benchmark, case: Case, task: Any, device: torch.device) -> Row:
    """A row without times: whether the results of `task` (worker.Task) are right."""
    row: Row = {"op": task.op, "case": case.label, "pass": task.which}
    row |= {"dtype": task.dtype, "backend": task.backend}
    try:
        with dispatch.preferring(task.backend):
            place = placer(DTYPES[task.dtype], device)
            shares = check(benchmark, case, task.which, task.backend, place)
    except WrongResult as error:
        return row | {"wrong": str(error)}
    except Exception as error:  # as in _rows
        return row | {"failed": _reason(error)}
    return row | {"error_of_budget": max(shares.values(), default=0.0)}


def once(benchmark: Benchmark, case: Case, task: Any, device: torch.device) -> None:
    """One call of `task` (worker.Task), to its end, and nothing beside it."""
    inputs = placer(DTYPES[task.dtype], device)(benchmark.inputs(case))
    with dispatch.preferring(task.backend):
        prepare(benchmark.mbm(task.backend), inputs, benchmark.differentiable(inputs)).call(
            task.which
        )()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm(
    benchmark: Benchmark, case: Case, which: str, settings: GpuSettings, device: torch.device
) -> Iterator[tuple[str, str | None]]:
    """Calls each form once, which compiles it, as `_calls` and `check` will; why one fails.

    The same functions on the same shapes in another process find it in the caches on disk.
    """
    place = placer(DTYPES[settings.dtypes[0]], device)
    for name, form in {MBM: benchmark.mbm(settings.backend), **benchmark.stock(case)}.items():
        if which not in form.passes or (form.compile and not settings.compile):
            continue
        for shapes in (case, case.for_check(which)) if name == MBM else (case,):
            torch._dynamo.reset()
            inputs = place(benchmark.inputs(shapes))
            prepared = prepare(form, inputs, benchmark.differentiable(inputs))
            with dispatch.preferring(settings.backend):
                reason = call_fails(prepared, which)
            del inputs, prepared
        yield name, reason


def _rows(
    benchmark: Benchmark,
    case: Case,
    which: str,
    dtype: str,
    device: torch.device,
    settings: GpuSettings,
) -> Iterator[Row]:
    place = placer(DTYPES[dtype], device)
    head: Row = {
        "op": benchmark.op,
        "case": case.label,
        "sizes": case.sizes,
        "options": {name: str(value) for name, value in case.options.items()},
        "pass": which,
        "dtype": dtype,
        "backend_asked": settings.backend,
        "quick": False,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        for row in _measured(benchmark, case, which, dtype, place, settings, head):
            yield head | row
    except WrongResult as error:
        yield head | {"wrong": str(error)}
    except Exception as error:  # of torch, triton, a compiler or the driver
        # A row that cannot run says why; the rows after it are measured all the same.
        yield head | {"failed": _reason(error)}


def _measured(
    benchmark: Benchmark,
    case: Case,
    which: str,
    dtype: str,
    place: Callable[[Inputs], Inputs],
    settings: GpuSettings,
    head: Row,
) -> Iterator[Row]:
    """Rows without their `head`, which learns here by what they were computed."""
    watched = watch(benchmark, case, which, settings.backend, place)
    backends = watched.backends
    head |= {
        "backend": backend_name(benchmark.op, backends),
        "backends": backends,
        "dispatch_sizes": watched.sizes.get(benchmark.op, {}),
    }
    shares = check(benchmark, case, which, backends.get(benchmark.op, settings.backend), place)
    head["error_of_budget"] = max(shares.values(), default=0.0)
    calls, unavailable = _calls(benchmark, case, which, place, settings)
    called = {name: call for name, call in calls.items() if GRAPH not in name}
    peaks = {
        "peak_extra_bytes": {name: _peak_extra_bytes(call) for name, call in called.items()},
        "result_bytes": {name: memory.result_bytes(call()) for name, call in called.items()},
    }
    for l2, sampler in (("hot", hot_sample), ("cold", cold_sample)):
        times = timing.interleave(
            calls, settings.seconds, min_rounds=settings.min_rounds, sampler=sampler
        )
        row = _summary(times, unavailable) | {"l2": l2} | peaks
        if benchmark.work is not None:
            row["limit"] = _share(benchmark.work(case, which), row["mbm_ms"], dtype)
        yield row


def _summary(times: Mapping[str, Any], unavailable: dict[str, str]) -> Row:
    """Ratios of the fastest PyTorch baseline to the best of mbm's own two ways of being called."""
    summaries = {name: Summary.of(t) for name, t in times.items()}

    def best(names: Sequence[str]) -> str:
        return min(names, key=lambda name: summaries[name].median_ms)

    ours = best([name for name in times if name.removesuffix(GRAPH) == MBM])
    stock = best([name for name in times if name.removesuffix(GRAPH) != MBM])
    called = best([n for n in times if n.removesuffix(GRAPH) != MBM and GRAPH not in n])
    ratio = paired_ratio(times[stock], times[ours])
    return {
        "forms": {name: summary.as_dict() for name, summary in summaries.items()},
        "unavailable": unavailable,
        "mbm_form": ours,
        "stock_form": stock,
        "mbm_ms": summaries[ours].median_ms,
        "stock_ms": summaries[stock].median_ms,
        "ratio": ratio.value,
        "ratio_lo": ratio.low,
        "ratio_hi": ratio.high,
        "verdict": ratio.verdict(),
        "ratio_called": paired_ratio(times[called], times[MBM]).value,
        "ratios": {
            name: paired_ratio(times[name], times[ours]).value
            for name in times
            if name.removesuffix(GRAPH) != MBM
        },
    }


def _calls(
    benchmark: Benchmark,
    case: Case,
    which: str,
    place: Callable[[Inputs], Inputs],
    settings: GpuSettings,
) -> tuple[dict[str, timing.Call], dict[str, str]]:
    torch._dynamo.reset()
    inputs = place(benchmark.inputs(case))
    diff = benchmark.differentiable(inputs)
    forms = {n: f for n, f in benchmark.stock(case).items() if which in f.passes}
    calls: dict[str, timing.Call] = {}
    unavailable: dict[str, str] = {}
    for name, form in {MBM: benchmark.mbm(settings.backend), **forms}.items():
        if form.compile and not settings.compile:
            continue
        if form.compiler is engines.frozen:  # it packs weights for oneDNN, and compiles for a while
            continue
        prepared: Prepared = prepare(form, inputs, diff)
        if name != MBM and (reason := call_fails(prepared, which)):
            unavailable[name] = reason
            continue
        calls[name] = prepared.call(which)
        try:
            calls[name + GRAPH] = captured(calls[name])
        except Exception as error:  # as above; a form without a graph is timed as it is called
            unavailable[name + GRAPH] = _reason(error)
    return calls, unavailable


def captured(call: timing.Call) -> timing.Call:
    """The call as a CUDA graph's replay.

    Raises:
        RuntimeError: when it synchronises or does what else a capture forbids; what synchronises is
            found before the capture, which would not leave the process as it was.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
        with no_synchronisation():
            call()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()  # the graph writes these outputs at every replay
    finally:
        torch.cuda.set_stream(current)  # which a capture that fails at its end leaves changed

    def replay() -> object:
        graph.replay()
        return kept

    return replay


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within it torch raises a RuntimeError where it would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def hot_sample(call: timing.Call, loops: int) -> float:
    """Nanoseconds per call of `loops` calls in a row, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6 / loops


def cold_sample(call: timing.Call, loops: int) -> float:
    """Nanoseconds per call, the L2 cache overwritten before each."""
    events = []
    for _ in range(loops):
        _flush_buffer().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) * 1e6 / loops


@functools.cache
def _flush_buffer() -> Tensor:
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def _peak_extra_bytes(call: timing.Call) -> int:
    """What a call takes beyond what was allocated before, its outputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def _share(work: Work, milliseconds: float, dtype: str) -> dict[str, Any]:
    limit = limits(dtype)
    scaled = in_dtype(work, DTYPES[dtype])
    least, bound = limit.least_seconds(scaled)
    return {
        "bound": bound,
        "share": least * 1e3 / milliseconds,
        "operations": scaled.operations,
        "bytes": scaled.bytes,
        "operations_per_s": limit.operations_per_s,
        "bytes_per_s": limit.bytes_per_s,
        "source": limit.source,
    }


@functools.cache
def limits(dtype: str) -> Limits:
    """Measured rates of this device: a product of 8192 x 8192 matrices and a copy of 1 GiB."""
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=DTYPES[dtype])
    b = torch.randn_like(a)
    source = torch.randint(0, 255, (2**30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, timing.Call] = {"mm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = timing.interleave(calls, 0.3, min_rounds=5, sampler=hot_sample)
    return Limits(
        2 * n**3 / times["mm"].min() * 1e9,
        2 * source.numel() / times["copy"].min() * 1e9,
        f"{dtype} matrix product of 8192 cubed",
    )
