"""What a set of interleaved timings says: medians, paired ratios, bootstrap intervals."""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
RESAMPLES = 2000
FLOOR = 0.05  # A/A runs on a noisy 2-core machine stay inside it: 0 false alarms of 120


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

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios stock / mbm, above 1 = faster, and its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    def verdict(self, floor: float = FLOOR) -> str:
        """ "faster" or "slower" where the whole interval clears the floor, else "same"."""
        if self.low > 1 + floor:
            return "faster"
        if self.high < 1 / (1 + floor):
            return "slower"
        return "same"


def paired_ratio(stock: Times, mbm: Times, seed: int = 0) -> Ratio:
    """The ratio of two forms timed in the same rounds; the same times give the same interval.

    Args:
        stock, mbm: [rounds], nanoseconds per call; entry i of both comes from round i.
        seed: of the bootstrap's resampling.

    Raises:
        ValueError: when the lengths differ or there is no round.
    """
    if stock.shape != mbm.shape or stock.size == 0:
        raise ValueError(
            f"paired_ratio: got {stock.shape} and {mbm.shape} rounds; "
            "expected the same number, at least 1; time both in the same rounds"
        )
    ratios = stock / mbm
    picks = np.random.default_rng(seed).integers(0, ratios.size, (RESAMPLES, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))
