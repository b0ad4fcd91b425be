"""How far results are from those in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mbm_kernels._core.accuracy import max_abs

MOST_ERROR = 1e-2  # an engine further from the truth than this computes something else
NAMED = 100  # times our error, from which a table says so


def relative_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of a floating result, over the largest value of that result in `truth`.

    inf where shapes differ or a result is not finite where the truth is.
    """
    if len(results) < len(truth):
        return math.inf
    worst = 0.0
    for found, exact in zip(results, truth, strict=False):
        if not exact.is_floating_point():
            continue
        if found.numel() != exact.numel():
            return math.inf
        difference = found.double().reshape(exact.shape) - exact
        if not torch.isfinite(difference).all():
            return math.inf
        worst = max(worst, max_abs(difference) / (max_abs(exact) or 1.0))
    return worst


def remark(error: float | None, ours: float | None) -> str:
    """Of an engine whose error is many times ours, how many; else nothing."""
    if not error or not ours or error < NAMED * ours:
        return ""
    return f"{error / ours:,.0f} times our error"
