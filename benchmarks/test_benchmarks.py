"""The small cases of every benchmark, eager forms beside mbm, for pytest-benchmark's comparisons.

Times of separate runs: compare on one machine. The ratios to publish come from the interleaved
rounds of `python -m benchmarks`.
"""

from pathlib import Path

import pytest

from mbm_kernels.bench import harness
from mbm_kernels.bench.cli import load
from mbm_kernels.bench.correct import check


def cases():
    for benchmark in load(Path(__file__).resolve().parent):
        for case in benchmark.choose(None, quick=True):
            for which in case.passes:
                eager = [n for n, f in benchmark.stock(case).items() if not f.compile]
                for form in (harness.MBM, *eager):
                    name = f"{benchmark.op}-{case}-{which}-{form}".replace(" ", "-")
                    yield pytest.param(benchmark, case, which, form, id=name)


@pytest.mark.parametrize(("bench", "case", "which", "form"), list(cases()))
def test_speed(benchmark, bench, case, which, form):
    if form == harness.MBM:
        check(bench, case, which)
    benchmark.group = f"{bench.op} {case.label} {which}"
    benchmark(harness.eager_calls(bench, case, which)[form])
