"""Interleaved timing: every round takes one sample of every form, in random order.

Slow drifts of a shared machine (frequency, neighbours) then hit all forms alike, and the ratio of
two samples of the same round cancels them.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from mbm_kernels._core.ratios import Times

LEAST_SAMPLE_NS = 2_000_000  # perf_counter_ns and the loop cost under 0.1 us
MIN_ROUNDS = 9
MAX_ROUNDS = 200
WARM_UP_CALLS = 3
# In which threads of the form before stop spinning (libgomp's take 12 ms on Zen 3), and those of
# the next one wake up.
SETTLE_SECONDS = 0.02
WARM_UP_NS = 200_000_000  # enough calls of a slow form

Call = Callable[[], object]
Sampler = Callable[[Call, int], float]  # nanoseconds per call over that many calls


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch, and the kernels that ask torch, use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sample(call: Call, loops: int) -> float:
    """Nanoseconds per call over `loops` calls."""
    start = time.perf_counter_ns()
    for _ in range(loops):
        call()
    return (time.perf_counter_ns() - start) / loops


def cpu_sample(call: Call, loops: int) -> float:
    """As `sample`, of the process's CPU time, in which other processes do not count."""
    start = time.process_time_ns()
    for _ in range(loops):
        call()
    return (time.process_time_ns() - start) / loops


def settle(call: Call, seconds: float) -> None:
    """Calls for that long, and to the end of the last."""
    end = time.perf_counter() + seconds
    while seconds and time.perf_counter() < end:
        call()


def calibrate(
    call: Call, least_ns: int | None = None, sampler: Sampler = sample
) -> tuple[int, float]:
    """Warms up; then the number of calls that makes a sample last `least_ns`, LEAST_SAMPLE_NS if
    None, and ns per call."""
    least_ns = LEAST_SAMPLE_NS if least_ns is None else least_ns
    spent, calls = 0.0, 0
    while calls == 0 or (calls < WARM_UP_CALLS and spent < WARM_UP_NS):
        spent += sampler(call, 1)
        calls += 1
    loops = 1
    while True:
        per_call = sampler(call, loops)
        if per_call * loops >= least_ns:
            return loops, per_call
        # A tenth more than needed, since the first samples are the slowest.
        loops = max(loops + 1, min(loops * 10, int(1.1 * least_ns / max(per_call, 1.0)) + 1))


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    *,
    seed: int = 0,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    sampler: Sampler = sample,
    settle_seconds: float = 0.0,
) -> dict[str, Times]:
    """Times of each form by name, [rounds], nanoseconds per call.

    Args:
        calls: the forms, functions without arguments.
        seconds: about how long to sample; between `min_rounds` and `max_rounds` rounds are taken.
        seed: of the order within the rounds.
        sampler: takes a sample; by the host's clock, unless the work runs elsewhere.
        settle_seconds: of calls that are not timed before each sample: SETTLE_SECONDS where forms
            have threads of their own, each of which would spin on into the next.
    """
    with no_gc():
        loops = {name: calibrate(call, sampler=sampler) for name, call in calls.items()}
        round_ns = sum(count * per_call for count, per_call in loops.values())
        if settle_seconds:
            round_ns += sum(settle_seconds * 1e9 + per_call for _, per_call in loops.values())
        rounds = max(min_rounds, min(max_rounds, int(seconds * 1e9 / round_ns)))
        times = {name: np.empty(rounds) for name in calls}
        order, shuffler = list(calls), random.Random(seed)
        for i in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                settle(calls[name], settle_seconds)
                times[name][i] = sampler(calls[name], loops[name][0])
    return times
