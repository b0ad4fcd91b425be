"""What interleaved timings say: medians, paired ratios, their intervals, and a verdict.

A ratio is measured in one process or in several. In one its interval covers the rounds of that
process; addresses and the state of the heap, which another draws anew, are not in it. Over several
it covers both: processes are resampled, then the rounds of each.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from mbm_kernels._core.ratios import AMBG as AMBG
from mbm_kernels._core.ratios import FAST as FAST
from mbm_kernels._core.ratios import FLOOR as FLOOR
from mbm_kernels._core.ratios import LEAST_FLOOR as LEAST_FLOOR
from mbm_kernels._core.ratios import SAME as SAME
from mbm_kernels._core.ratios import SLOW as SLOW
from mbm_kernels._core.ratios import Ratio as Ratio
from mbm_kernels._core.ratios import Times as Times
from mbm_kernels._core.ratios import medians, ratios_of
from mbm_kernels._core.ratios import paired_ratio as paired_ratio

RESAMPLES_OF_PROCESSES = 10_000  # their percentiles lie further out
MOST_FLOOR = 0.10  # a machine that tells a form from itself by more measures nothing
MOST_SPREAD = 2.0  # p80 / p20 of a form's samples
MOST_SHARE = 1.10  # of a limit that nothing exceeds


@dataclass(frozen=True)
class Summary:
    """Milliseconds per call over `rounds` samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, nanoseconds: Times) -> "Summary":
        p20, median, p80 = (float(p) / 1e6 for p in np.percentile(nanoseconds, (20, 50, 80)))
        return cls(median, p20, p80, len(nanoseconds))

    @classmethod
    def over(cls, processes: Sequence[Times]) -> "Summary":
        """Each figure is the median of those of the processes; `rounds` are all of theirs."""
        each = [cls.of(times) for times in processes]
        figures = [(s.median_ms, s.p20_ms, s.p80_ms) for s in each]
        median, p20, p80 = (float(x) for x in np.median(figures, axis=0))
        return cls(median, p20, p80, sum(s.rounds for s in each))

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def ratio_over(stock: Sequence[Times], mbm: Sequence[Times], seed: int = 0) -> Ratio:
    """The ratio over processes: the geometric mean of their medians, with an interval that covers
    processes and rounds (one process alone: `paired_ratio`).

    A hierarchical bootstrap. That of n processes is narrower than the truth by sqrt((n - 1) / n),
    and knows nothing of Student's t, so that its percentiles are taken as far out as makes up for
    both: Hesterberg, "What teachers should know about the bootstrap", 2015, section 5.1.

    Args:
        stock, mbm: of each process, as `paired_ratio` takes them.
    """
    if len(stock) == 1:
        return paired_ratio(stock[0], mbm[0], seed)
    each = [np.log(ratios_of(s, m)) for s, m in zip(stock, mbm, strict=True)]
    generator = np.random.default_rng(seed)
    # [resample, place]: a process drawn twice brings rounds drawn twice.
    drawn = generator.integers(0, len(each), (RESAMPLES_OF_PROCESSES, len(each)))
    resampled = np.empty(drawn.shape)
    for i, ratios in enumerate(each):
        here = drawn == i
        resampled[here] = medians(ratios, int(here.sum()), generator)
    tail = 100 * expanded_tail(len(each))
    low, high = np.percentile(resampled.mean(axis=1), (tail, 100 - tail))
    centre = np.mean([np.median(ratios) for ratios in each])
    return Ratio(*(float(np.exp(x)) for x in (centre, low, high)))


def expanded_tail(n: int, tail: float = 0.025) -> float:
    """The share to leave out on each side so that n resampled units cover 1 - 2 tail."""
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * student(1 - tail, n - 1))


def student(p: float, freedom: int) -> float:
    """Student's quantile by its expansion in 1 / freedom: within 1 % from 3 degrees on."""
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def spread(processes: Sequence[Times]) -> float:
    """p80 / p20 of a form's samples, in the process where it is largest."""
    return max(float(np.percentile(t, 80) / np.percentile(t, 20)) for t in processes)
