"""Fits a cost model's constants to timed problems.

The times of each kernel are fitted by constants of at least 0, so that the sum of squared relative
errors is least, an error above counting as one below. The margin in PyTorch's favour is, for each
kernel, the one with which the choice on problems left out of the fit would have cost least.
"""

import importlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mbm_kernels._core import cost
from mbm_kernels.bench.drawn_times import Timed

Floats = npt.NDArray[np.float64]
FOLDS = 5
FEWEST = 8  # problems of a kernel, below which nothing is known of it
MARGINS = (1.02, 1.04, 1.06, 1.08, 1.1, 1.13, 1.16, 1.2, 1.25, 1.3, 1.4, 1.5, 1.7, 2.0, 3.0)
LEAST_RATIO = 0.92  # no choice of ours may be slower than that
PENALTY = 2.0  # for each that is, in units of its time
ROUNDS = 12
OUTLIER = 0.25  # of the logarithm of a time: errors past it count as their amount, not its square


def least_squares(x: Floats, y: Floats) -> Floats:
    """The c >= 0 with the least |x c - y|, by Lawson and Hanson's active sets.

    Source: C. Lawson and R. Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    columns = x.shape[1]
    active = np.zeros(columns, dtype=bool)
    c = np.zeros(columns)
    gradient = x.T @ (y - x @ c)
    for _ in range(10 * columns):
        candidates = ~active & (gradient > 1e-10 * np.abs(x.T @ y).max())
        if not candidates.any():
            break
        active[np.argmax(np.where(candidates, gradient, -np.inf))] = True
        while True:
            trial = np.zeros(columns)
            trial[active] = np.linalg.lstsq(x[:, active], y, rcond=None)[0]
            wrong = active & (trial <= 0)
            if not wrong.any():
                break
            step = np.min(c[wrong] / (c[wrong] - trial[wrong]))
            c = c + step * (trial - c)
            active &= c > 1e-14 * max(c.max(), 1e-300)
        c = trial
        gradient = x.T @ (y - x @ c)
    return c


def fitted(amounts: Sequence[dict[str, float]], times: Floats) -> dict[str, float]:
    """Nanoseconds of a unit of each amount."""
    names = [n for n in amounts[0] if any(row[n] for row in amounts)]
    x = np.array([[row[n] for n in names] for row in amounts], dtype=float)
    scale = x.max(axis=0)
    weights = 1 / times
    constants = np.zeros(len(names))
    for _ in range(ROUNDS):
        constants = least_squares(x / scale * weights[:, None], times * weights)
        predicted = np.maximum(x / scale @ constants, 0.05 * times)
        error = np.abs(np.log(predicted / times))
        trust = np.minimum(1, OUTLIER / np.maximum(error, 1e-9))
        # Halfway between errors of each kind; a time that other work disturbed counts less.
        weights = np.sqrt(trust / (times * predicted))
    return {
        n: float(f"{c / s:.4g}") for n, c, s in zip(names, constants, scale, strict=True) if c > 0
    }


class Fit:
    """An operation's timed problems of one pass, and what is fitted to them."""

    def __init__(self, op: str, rows: Sequence[Timed], machine: dict[str, int]) -> None:
        model = importlib.import_module(f"mbm_kernels.ops.{op}.dispatch")
        self.rows = rows
        self.times = {
            "cpu": np.array([r.cpu_ns for r in rows], dtype=float),
            "torch": np.array([r.torch_ns for r in rows], dtype=float),
        }
        sizes = [{**r.sizes, **machine, "threads": r.threads} for r in rows]
        self.work = {b: [getattr(model, b)(p) for p in sizes] for b in ("cpu", "torch")}

    def constants(self, backend: str, kept: Sequence[int] | None = None) -> Any:
        """By kernel; one with few problems shares those of its family, as cost.family names it."""
        by_kernel: dict[str, list[int]] = defaultdict(list)
        by_family: dict[str, list[int]] = defaultdict(list)
        for i in range(len(self.rows)) if kept is None else kept:
            name = self.work[backend][i].kernel
            by_kernel[name].append(i)
            by_family[cost.family(name)].append(i)
        groups = {k: some for k, some in by_kernel.items() if len(some) >= FEWEST}
        groups = {**by_family, **groups}
        return {
            kernel: fitted([self.work[backend][i].amounts for i in some], self.times[backend][some])
            for kernel, some in sorted(groups.items())
            if len(some) >= FEWEST
        }

    def predicted(self, constants: dict[str, Any], i: int) -> tuple[float, float] | None:
        found = []
        for backend in ("cpu", "torch"):
            work = self.work[backend][i]
            units = cost.units_of(constants[backend], work.kernel)
            if units is None:
                return None
            found.append(cost.total(units, work))
        return found[0], found[1]

    def left_out(self) -> Floats:
        """log(torch / cpu) as predicted for each problem by a fit without it; NaN: not known."""
        ratios = np.full(len(self.rows), np.nan)
        for fold in range(FOLDS):
            kept = [i for i in range(len(self.rows)) if i % FOLDS != fold]
            without = {b: self.constants(b, kept) for b in self.work}
            for i in range(fold, len(self.rows), FOLDS):
                pair = self.predicted(without, i)
                if pair is not None and min(pair) > 0:
                    ratios[i] = math.log(pair[1] / pair[0])
        return ratios

    def margins(self) -> dict[str, float]:
        """The least predicted gain from which `auto` takes each of our kernels."""
        ratios, found = self.left_out(), {}
        names = [work.kernel for work in self.work["cpu"]]
        for kernel in sorted({*names, *map(cost.family, names)}):
            own = [i for i, name in enumerate(names) if kernel in (name, cost.family(name))]
            some = [i for i in own if not math.isnan(ratios[i])]
            if len(some) >= FEWEST:
                found[kernel] = min(MARGINS, key=lambda m: self._loss(some, ratios, m))
        return found

    def _loss(self, some: list[int], ratios: Floats, margin: float) -> float:
        loss = 0.0
        for i in some:
            cpu, torch = self.times["cpu"][i], self.times["torch"][i]
            taken = cpu if ratios[i] > math.log(margin) else torch
            best = min(cpu, torch)
            relative = taken / best - 1
            # Half by time, as the study counts, half by problem, as users meet them.
            loss += relative * (1 + best / np.mean(self.times["torch"][some]))
            if torch < LEAST_RATIO * taken:
                loss += PENALTY * relative
        return loss
