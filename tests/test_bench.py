"""mbm_kernels.bench: statistics, timing, memory, names of machines, results files, tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import mbm_kernels
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import BOTH, FORWARD, machine, memory, results, statistics, table, timing

from .conftest import raises

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


class TestStatistics:
    drift = np.linspace(1, 2.5, 40)

    def test_same_against_same_contains_one(self):
        inside = 0
        for seed in range(100):
            a, b = (noisy(40, 1.0, 2 * seed + i, self.drift) for i in range(2))
            ratio = statistics.paired_ratio(a, b)
            inside += ratio.low <= 1 <= ratio.high
            assert ratio.verdict() == "same"
        assert inside >= 90

    def test_slow_down_of_a_fifth_is_seen(self):
        for seed in range(50):
            stock, mbm = (noisy(40, s, 2 * seed + i, self.drift) for i, s in enumerate((1, 1.2)))
            ratio = statistics.paired_ratio(stock, mbm)
            assert ratio.verdict() == "slower"
            assert ratio.value == pytest.approx(1 / 1.2, rel=0.05)
            assert statistics.paired_ratio(mbm, stock).verdict() == "faster"

    def test_interval_is_repeatable(self):
        a, b = (noisy(20, 1.0, i, 1) for i in range(2))
        assert statistics.paired_ratio(a, b) == statistics.paired_ratio(a, b)

    def test_summary(self):
        summary = statistics.Summary.of(np.arange(1, 102) * 1e6)
        assert (summary.median_ms, summary.p20_ms, summary.p80_ms) == (51, 21, 81)
        assert summary.rounds == 101

    def test_bad_input(self):
        with raises(ValueError, "same number"):
            statistics.paired_ratio(np.ones(3), np.ones(4))
        with raises(ValueError, "at least 1"):
            statistics.paired_ratio(np.ones(0), np.ones(0))


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
        assert machine.cpu_slug(AMD) == "amd-family26-model2-avx512"
        assert machine.cpu_slug(AMD, "avx2") == "amd-family26-model2-avx2"
        assert machine.cpu_slug(INTEL) == "intel-family6-model94-avx2"
        assert machine.cpu_slug(ARM) == "arm-implementer65-part3340-baseline"
        assert machine.cpu_slug("").endswith("-baseline")
        assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"

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
        warm = machine.heap_environment("warm")
        code = "from mbm_kernels.bench import machine; print(machine.heap())"
        found = subprocess.run(
            [sys.executable, "-c", code], env=warm, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "warm"

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


def row(**changes):
    return {
        "op": "gru",
        "case": "B1 T32",
        "pass": FORWARD,
        "dtype": "float32",
        "threads": 2,
        "heap": "warm",
        "backend": "cpu",
        "quick": False,
        "mbm_ms": 0.5,
        "stock_form": "eager",
        "stock_ms": 2.0,
        "ratio": 4.0,
        "ratio_lo": 3.9,
        "ratio_hi": 4.1,
        "verdict": "faster",
        "ratios": {"eager": 4.0, "compile": 5.0},
        "unavailable": {},
        "peak_extra_bytes": {"mbm": 3 * 2**20, "eager": None},
        "result_bytes": {"mbm": 2**20, "eager": 2**20},
        **changes,
    }


class TestResults:
    @pytest.fixture(autouse=True)
    def _no_out(self, monkeypatch):
        monkeypatch.delenv("OUT", raising=False)

    def test_round_trip_and_merge(self, tmp_path):
        commit = "0123456789abcdef"
        file = results.ResultsFile(tmp_path, commit, "2026-11-30")
        assert file.path == tmp_path / machine.device() / "2026-11-30-0123456.json"
        assert file.rows() == []
        file.append(row())
        # Another operation, on another day, in another process: the same file.
        other = results.ResultsFile(tmp_path, commit, "2026-12-01")
        other.append(row(op="gru_cell"))
        file.append(row(heap="default"))
        file.append(row(mbm_ms=0.4))
        found = results.read(file.path)
        assert [(r["op"], r["heap"], r["mbm_ms"]) for r in found["rows"]] == [
            ("gru_cell", "warm", 0.5),
            ("gru", "default", 0.5),
            ("gru", "warm", 0.4),
        ]
        assert (found["schema"], found["commit"]) == (results.SCHEMA, commit)
        assert len(list(tmp_path.rglob("*"))) == 2

    def test_losing_rows_of_a_named_backend_stay(self, tmp_path):
        file = results.ResultsFile(tmp_path, "a" * 40)
        file.append(row(backend="cpu", ratio=0.5))
        file.append(row(backend="torch", ratio=1.0))
        assert [r["ratio"] for r in file.rows()] == [0.5, 1.0]

    def test_out_and_no_commit(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        file = results.ResultsFile(tmp_path / "base", None, "2026-11-30")
        assert file.path == tmp_path / "out" / "2026-11-30-nocommit.json"
        file.append(row())
        assert results.read(file.path)["commit"] is None

    @pytest.mark.parametrize("stage", ["fsync", "replace"])
    def test_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch, stage):
        path = tmp_path / "result.json"
        write_atomic(path, b"old")

        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(*((os, "fsync") if stage == "fsync" else (Path, "replace")), stop)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_foreign_files(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text('{"schema": 99}')
        with raises(ValueError, "got schema 99", "expected 1"):
            results.read(path)
        path.write_text('{"schema": 1, "ro')
        with raises(ValueError, "not JSON"):
            results.read(path)


class TestTable:
    @pytest.mark.parametrize("width", [80, 100, 160])
    def test_nothing_is_cut_off(self, width):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        losing = row(ratio=0.5, ratio_lo=0.45, ratio_hi=0.55, verdict="slower", op="gru_cell")
        table.print_rows([row(), losing, row(**{"pass": BOTH}, heap="default")], console)
        text = console.export_text()
        assert "…" not in text
        for part in ("4.00x", "3.90-4.10", "0.50x", "0.45-0.55", "default heap", "fwd+bwd"):
            assert part in text
        assert ("compile 5.00x" in text) == (width >= table.WIDE)

    def test_wrong_rows_have_no_speed(self):
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        wrong = {n: row().get(n) for n in results.KEY} | {"wrong": "error 1 over the budget"}
        table.print_rows([wrong], console)
        line = console.export_text().splitlines()[2]
        assert "WRONG" in line
        assert "x " not in line

    def test_markdown_between_markers(self, tmp_path):
        file = results.ResultsFile(tmp_path / "results", "a" * 40)
        file.append(row())
        file.append(row(op="gru_cell", ratio=0.8, ratio_lo=0.7, ratio_hi=0.9))
        file.append(row(heap="default", ratio=9.0))
        file.append(row(threads=1, ratio=8.0))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n")
        for _ in range(2):
            table.update_readme(readme, results.read(file.path), file.path)
        text = readme.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\n")
        assert text.endswith(f"{table.END}\nafter\n")
        assert "stale" not in text
        assert "| gru | B1 T32 | forward | cpu | eager | 2 | 0.5 | 4.00 (3.90 to 4.10) |" in text
        assert "0.80 (0.70 to 0.90)" in text
        assert "9.00" not in text
        assert "8.00" not in text
        assert f"results/{machine.device()}/{file.path.name}" in text

    @pytest.mark.parametrize(
        "text", ["", table.BEGIN, table.END + table.BEGIN, (table.BEGIN + table.END) * 2]
    )
    def test_missing_markers(self, text):
        with raises(ValueError, "markers"):
            table.replace_between_markers(text, "new")
