"""Paired ratios of two forms timed in the same rounds, with their intervals, and a verdict."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
RESAMPLES = 2000
FLOOR = 0.05  # where no form was timed against itself
LEAST_FLOOR = 0.01  # two forms differ by their code's alignment, a form and itself do not
FAST, SLOW, SAME, AMBG = "FAST", "SLOW", "SAME", "AMBG"


@dataclass(frozen=True)
class Ratio:
    """Paired ratio stock / mbm, above 1 = faster, and its 95 % interval."""

    value: float
    low: float
    high: float

    def floor(self) -> float:
        """Of a form against itself: how far from 1 the machine alone brings a ratio."""
        return max(
            LEAST_FLOOR, math.exp(max(abs(math.log(self.low)), abs(math.log(self.high)))) - 1
        )

    def verdict(self, floor: float = FLOOR) -> str:
        """FAST or SLOW where the whole interval clears the floor, SAME where it all lies inside;
        else AMBG."""
        if self.low > 1 + floor:
            return FAST
        if self.high < 1 / (1 + floor):
            return SLOW
        return SAME if self.low >= 1 / (1 + floor) and self.high <= 1 + floor else AMBG


def ratios_of(stock: Times, mbm: Times) -> Times:
    """Of each round."""
    if stock.shape != mbm.shape or stock.size == 0:
        raise ValueError(
            f"paired_ratio: got {stock.shape} and {mbm.shape} rounds; "
            "expected the same number, at least 1; time both in the same rounds"
        )
    return stock / mbm


def medians(ratios: Times, count: int, generator: np.random.Generator) -> Times:
    """Those of `count` resamples."""
    picks = generator.integers(0, ratios.size, (count, ratios.size))
    found: Times = np.median(ratios[picks], axis=1)
    return found


def paired_ratio(stock: Times, mbm: Times, seed: int = 0) -> Ratio:
    """The ratio of two forms timed in the same rounds of one process, with a bootstrap interval.

    The same times give the same interval.

    Args:
        stock, mbm: [rounds], nanoseconds per call; entry i of both comes from round i.
        seed: of the bootstrap's resampling.

    Raises:
        ValueError: when the lengths differ or there is no round.
    """
    ratios = ratios_of(stock, mbm)
    drawn = medians(ratios, RESAMPLES, np.random.default_rng(seed))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))
