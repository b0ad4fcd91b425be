"""The one rule of correctness.

`truth` is the reference in float64, `yardstick` a plain torch result in the tested dtype. In the
max-abs norm the error may be twice the yardstick's (three times for gradients) plus a floor of
4 eps times the largest value of the reference on the absolute values of its inputs: a legitimate
other order of summation differs by that much. Where that reference saturates (a gate's 1 - z is 0
on large positive inputs) the largest true value stands in for it: no result is exact to less than
its own rounding.

In float64 the truth is no more exact than the result, so that what is measured is the sum of two
errors: there the yardstick's error is twice its float32 error, scaled by the ratio of the two eps
(`float64_yardstick`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from mbm_kernels._core.accuracy import FLOOR_EPS as FLOOR_EPS
from mbm_kernels._core.accuracy import FORWARD_FACTOR as FORWARD_FACTOR
from mbm_kernels._core.accuracy import GRADIENT_FACTOR as GRADIENT_FACTOR
from mbm_kernels._core.accuracy import Budget as Budget
from mbm_kernels._core.accuracy import max_abs as max_abs


@dataclass(frozen=True)
class Measured:
    """What a result's error was, and what it might have been."""

    what: str
    error: float
    budget: Budget

    def __str__(self) -> str:
        given = self.budget
        return (
            f"{self.what}: error {self.error:.3g} over the budget {given.limit:.3g} "
            f"= {given.factor:g} x {given.yardstick:.3g} of stock torch + floor {given.floor:.3g}"
        )


class OverBudgetError(AssertionError):
    """A result of the right shape, type and pattern of NaN whose error is too large."""


_measured: ContextVar[list[Measured] | None] = ContextVar("measured", default=None)


@contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Within it assert_matches notes errors in the list instead of judging them."""
    found: list[Measured] = []
    token = _measured.set(found)
    try:
        yield found
    finally:
        _measured.reset(token)


def float64_yardstick(single: Tensor, truth: Tensor) -> float:
    """Stock torch's error in float64 plus the truth's own; `single` is its float32 result."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * max_abs(single.double() - truth) * ratio


def assert_matches(
    actual: Tensor,
    truth: Tensor,
    yardstick: Tensor,
    absolute: Tensor,
    *,
    gradient: bool = False,
    extra: float = 0.0,
    yardstick_error: float | None = None,
    what: str = "result",
) -> Budget:
    """Asserts the rule of this module, and the same pattern of NaN and infinities as `yardstick`.

    Args:
        actual: the result under test, in the tested dtype.
        truth: the reference in float64, same shape.
        yardstick: a plain torch result in the tested dtype, same shape.
        absolute: the reference in float64 on the absolute values of its inputs.
        gradient: whether this is a gradient (factor 3 instead of 2).
        extra: an operation's own named constant, times max|truth| (Winograd has one).
        yardstick_error: in place of max|yardstick - truth|, for float64.
        what: named in the message.

    Raises:
        AssertionError: another shape, type or pattern of NaN and infinities.
        OverBudgetError: with the measured error and the budget.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    assert actual.dtype == yardstick.dtype, f"{what}: {actual.dtype}, expected {yardstick.dtype}"
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        differing = int((test(actual) != test(yardstick)).sum())
        assert differing == 0, f"{what}: {differing} elements differ from stock in being {kind}"
    eps = torch.finfo(yardstick.dtype).eps
    if yardstick_error is None:
        yardstick_error = max_abs(yardstick.double() - truth)
    budget = Budget(
        GRADIENT_FACTOR if gradient else FORWARD_FACTOR,
        yardstick_error,
        FLOOR_EPS * eps * max(max_abs(absolute), max_abs(truth)) + extra * max_abs(truth),
    )
    measured = Measured(what, max_abs(actual.double() - truth), budget)
    if (found := _measured.get()) is not None:
        found.append(measured)
    elif measured.error > budget.limit:
        raise OverBudgetError(str(measured))
    return budget
