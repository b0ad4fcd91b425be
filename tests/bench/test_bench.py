"""mbm_kernels.bench: statistics, timing, limits, memory, names of machines."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mbm_kernels
from mbm_kernels._core import processor, timing
from mbm_kernels.bench import (
    Work,
    limits,
    machine,
    memory,
    samples,
    statistics,
)
from tests.conftest import raises

AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu sse2 fma f16c avx avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 99
"""
INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 94
model name\t: Intel(R) Core(TM) i7-6700 CPU @ 3.40GHz
flags\t\t: fpu sse2 fma f16c avx avx2
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd
CPU implementer\t: 0x41
CPU part\t: 0xd0c
"""


def noisy(rounds, scale, seed, drift):
    """Times with jitter, one outlier in ten and a drift that both forms share."""
    generator = np.random.default_rng(seed)
    jitter = generator.normal(1, 0.04, rounds) + 3 * (generator.random(rounds) < 0.1)
    return 1e6 * scale * jitter * drift


def processes(scale, seed, between=0.03, count=5, rounds=20):
    """Times of a form in each process, which draws a factor of its own."""
    factors = np.random.default_rng(seed).lognormal(0, between, count)
    return [noisy(rounds, scale * f, 100 * seed + i, 1) for i, f in enumerate(factors)]


class TestStatistics:
    drift = np.linspace(1, 2.5, 40)

    def test_same_against_same_contains_one(self):
        inside, verdicts = 0, []
        for seed in range(100):
            a, b, again = (noisy(40, 1.0, 3 * seed + i, self.drift) for i in range(3))
            ratio = statistics.paired_ratio(a, b)
            inside += ratio.low <= 1 <= ratio.high
            verdicts.append(ratio.verdict(statistics.paired_ratio(again, b).floor()))
        assert inside >= 90
        assert verdicts.count("FAST") + verdicts.count("SLOW") <= 2

    def test_slow_down_of_a_fifth_is_seen(self):
        for seed in range(50):
            stock, mbm = (noisy(40, s, 2 * seed + i, self.drift) for i, s in enumerate((1, 1.2)))
            ratio = statistics.paired_ratio(stock, mbm)
            assert ratio.verdict() == "SLOW"
            assert ratio.value == pytest.approx(1 / 1.2, rel=0.05)
            assert statistics.paired_ratio(mbm, stock).verdict() == "FAST"

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (1.11, 1.3, "FAST"),
            (0.8, 0.9, "SLOW"),
            (0.95, 1.08, "SAME"),
            (1.02, 1.2, "AMBG"),  # some of it faster
            (0.85, 1.0, "AMBG"),
            (0.5, 2.0, "AMBG"),  # a wide interval says nothing, not that they are the same
        ],
    )
    def test_verdicts(self, low, high, verdict):
        assert statistics.Ratio((low + high) / 2, low, high).verdict(floor=0.1) == verdict

    def test_floor_is_what_a_form_shows_beside_itself(self):
        assert statistics.Ratio(1.0, 0.98, 1.04).floor() == pytest.approx(0.04)
        assert statistics.Ratio(1.0, 1 / 1.07, 1.04).floor() == pytest.approx(0.07)
        assert statistics.Ratio(1.0, 1.0, 1.0).floor() == statistics.LEAST_FLOOR

    def test_interval_over_processes_covers_what_one_misses(self):
        """Of 100 pairs that differ by chance alone, per process and per round."""
        within = over = 0
        for seed in range(100):
            a, b = (processes(1.0, 2 * seed + i) for i in range(2))
            one = statistics.ratio_over(a[:1], b[:1])
            five = statistics.ratio_over(a, b)
            within += one.low <= 1 <= one.high
            over += five.low <= 1 <= five.high
        assert over >= 90
        assert within < 60

    def test_tail_is_that_of_student(self):
        for freedom, quantile in ((4, 2.776), (9, 2.262), (29, 2.045)):
            assert statistics.student(0.975, freedom) == pytest.approx(quantile, rel=0.005)
        # Hesterberg's table of sizes of expanded intervals, n = 5
        assert statistics.expanded_tail(5) == pytest.approx(0.001, abs=1e-4)
        assert statistics.expanded_tail(1000) == pytest.approx(0.025, rel=0.01)

    def test_interval_is_repeatable(self):
        a, b = (noisy(20, 1.0, i, 1) for i in range(2))
        assert statistics.paired_ratio(a, b) == statistics.paired_ratio(a, b)
        assert statistics.ratio_over([a, b], [b, a]) == statistics.ratio_over([a, b], [b, a])

    def test_summary(self):
        times = np.arange(1, 102) * 1e6
        summary = statistics.Summary.of(times)
        assert (summary.median_ms, summary.p20_ms, summary.p80_ms) == (51, 21, 81)
        assert summary.rounds == 101
        assert statistics.Summary.over([times, 2 * times, 3 * times]).median_ms == 102

    def test_spread_is_that_of_the_worst_process(self):
        assert statistics.spread([np.ones(10), np.repeat([1.0, 3.0], 5)]) == 3

    def test_bad_input(self):
        with raises(ValueError, "same number"):
            statistics.paired_ratio(np.ones(3), np.ones(4))
        with raises(ValueError, "at least 1"):
            statistics.paired_ratio(np.ones(0), np.ones(0))

    def test_samples_survive_as_text(self):
        times = {"mbm": processes(1.0, 1), "eager": processes(900.0, 2)}
        packed = json.loads(json.dumps(samples.pack(times)))
        assert len(json.dumps(packed)) < 4 * 200 * 2
        found = samples.unpack(packed)
        for name, each in times.items():
            for before, after in zip(each, found[name], strict=True):
                np.testing.assert_allclose(after, before, rtol=1e-4)


class TestLimits:
    limit = limits.Limits(
        operations_per_s=1e9, bytes_per_s=1e6, last=1000, second=100, last_bytes_per_s=1e7
    )

    @pytest.mark.parametrize(
        ("work", "seconds", "bound"),
        [
            (Work(1e9, 0), 1.0, "arithmetic"),
            (Work(1e9, 0, fewest=1e8), 0.1, "arithmetic"),
            (Work(0, 600), 5e-5, "cache"),  # 500 bytes of it are not in the second level
            (Work(0, 3000), 2e-3, "memory"),  # 2000 of them are in no cache
        ],
    )
    def test_bytes_count_from_where_they_must_come(self, work, seconds, bound):
        found, name = self.limit.least_seconds(work)
        assert (found, name) == (pytest.approx(seconds), bound)


class TestTiming:
    def test_samples_last_long_enough(self):
        loops, per_call = timing.calibrate(lambda: None, 200_000)
        assert loops * per_call >= 200_000

    def test_rounds_hold_every_form_once_in_changing_order(self, monkeypatch):
        calls, order = {"a": lambda: None, "b": lambda: None, "c": lambda: None}, []
        names = {call: name for name, call in calls.items()}
        monkeypatch.setattr(timing, "calibrate", lambda call, sampler: (1, 1e6))
        times = timing.interleave(
            calls, 0.0, min_rounds=20, sampler=lambda call, loops: order.append(names[call]) or 1.0
        )
        rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
        assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
        assert len(set(rounds)) > 3
        assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}

    def test_times_are_per_call(self, monkeypatch):
        now = [0]

        def advance(nanoseconds):
            now[0] += nanoseconds

        monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
        times = timing.interleave(
            {"short": lambda: advance(1_000), "long": lambda: advance(3_000_000)}, 0.0
        )
        assert set(times["short"]) == {1_000}
        assert set(times["long"]) == {3_000_000}
        assert len(times["long"]) == timing.MIN_ROUNDS

    def test_threads_are_restored(self):
        before = torch.get_num_threads()
        with timing.threads(before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before


class TestMachine:
    def test_slugs(self):
        assert processor.cpu_slug(AMD) == "amd-family26-model2-avx512"
        assert processor.cpu_slug(AMD, "avx2") == "amd-family26-model2-avx2"
        assert processor.cpu_slug(INTEL) == "intel-family6-model94-avx2"
        assert processor.cpu_slug(ARM) == "arm-implementer65-part3340-baseline"
        assert processor.cpu_slug("").endswith("-baseline")
        assert processor.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"

    def test_heaps(self, monkeypatch):
        for name in list(os.environ):
            if name.startswith("MALLOC_"):
                monkeypatch.delenv(name)
        assert machine.heap() == "default"
        monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
        assert machine.heap() == "custom"
        assert "MALLOC_ARENA_MAX" not in machine.heap_environment("default")
        with raises(ValueError, "heap: got 'hot'", "default, warm"):
            machine.heap_environment("hot")

    @pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no Linux /proc")
    def test_load_is_what_others_take(self, monkeypatch):
        now = iter([(0.0, 100.0, 10.0), (2.0, 103.0, 11.0)])
        monkeypatch.setattr(machine.Others, "_now", staticmethod(lambda: next(now)))
        assert machine.Others().cores() == 1.0  # 3 s busy in 2 s, 1 of them our own
        monkeypatch.undo()
        assert machine.Others().cores() >= 0.0
        monkeypatch.setattr(machine.Others, "_now", staticmethod(lambda: None))
        assert machine.Others().cores() is None

    def test_commit(self, tmp_path):
        assert machine.commit(tmp_path) is None
        assert machine.is_dirty(tmp_path) is None

    def test_facts_are_json(self):
        facts = machine.facts()
        assert json.loads(json.dumps(facts)) == facts
        assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux /proc")
class TestMemory:
    def test_peak_of_a_call(self):
        def call():
            temporary = torch.ones(16 * 2**20)  # 64 MiB, gone at the end
            return (temporary + 1)[:1].clone()  # and as much again

        call()
        peak = memory.peak_extra_bytes(call)
        if peak is None:
            pytest.skip("the kernel or the C library does not tell")
        assert 100 * 2**20 < peak < 160 * 2**20
        assert memory.peak_extra_bytes(lambda: None) < 4 * 2**20

    def test_counts_working_memory_that_kernels_keep(self):
        hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (256, 4000))
        target = torch.randint(4000, (256,))

        def call():
            loss = mbm_kernels.linear_cross_entropy(hidden, weight, target, backend="cpu")
            return torch.autograd.grad(loss, (hidden, weight))

        call()
        call()  # its working memory is kept from here on
        peak = memory.peak_extra_bytes(call)
        if peak is None:
            pytest.skip("the kernel or the C library does not tell")
        assert peak - memory.result_bytes(call()) > 2 * 2**20  # of 3 MB of logits

    def test_results_count_each_storage_once(self):
        x = torch.zeros(1000)
        assert memory.result_bytes((x, [x[10:], x.view(10, 100)], None, 3)) == 4000
        assert memory.result_bytes([x, torch.zeros(3, dtype=torch.int64)]) == 4024

    def test_unknown_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "PROC", tmp_path / "absent")
        assert memory.peak_extra_bytes(lambda: None) is None
