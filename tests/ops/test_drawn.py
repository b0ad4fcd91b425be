"""Every operation's kernels over drawn shapes, layouts, lengths and masks, by the error rule.

40 of them or more for each operation on the widest ISA, half larger than one tile in every blocked
dimension, and fewer on the others; at least two of each stratum; the same ones in every run.
"""

import importlib
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels._core.op import OPS
from mbm_kernels.testing import OpSuite, cases, draws, errors

EXAMPLES, OTHER_EXAMPLES = 20, 4  # of each of the two sizes
# Stock's largest error over few elements may be small by luck. An example over its budget is
# judged again by the sums of errors and of budgets over this many draws of values; more than
# LUCK of the examples may not need it.
REDRAWN, LUCK = 16, 0.05


def suite_of(op: str) -> OpSuite:
    name = "Test" + "".join(word.capitalize() for word in op.split("_"))
    return getattr(importlib.import_module(f".test_{op}", __package__), name)()


def examples(isa: str) -> int:
    return EXAMPLES if isa == native.cpu().best_isa() else OTHER_EXAMPLES


def check(suite: OpSuite, drawn: cases.Drawn) -> None:
    suite.check_forward(drawn.inputs, "cpu")
    suite.check_backward(drawn.inputs, "cpu")


def check_redrawn(suite: OpSuite, drawn: cases.Drawn) -> None:
    redrawn = (drawn.redraw(seed) for seed in itertools.count())
    clear = (d for d in redrawn if cases.is_clear(suite.op, d.inputs))
    error, limit = Counter(), Counter()
    with errors.measuring() as found:
        for each in (drawn, *itertools.islice(clear, REDRAWN)):
            check(suite, each)
    for measured in found:
        error[measured.what] += measured.error
        limit[measured.what] += measured.budget.limit
    for what in error:
        assert error[what] <= limit[what], f"{what}: {error[what]:.3g} over {limit[what]:.3g}"


def test_every_operation_has_a_strategy():
    assert set(cases.STRATEGIES) == set(OPS)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("op", sorted(op for op in OPS if mbm_kernels.backends(op)["cpu"] is None))
def test_cpu(op, large, isa):
    suite, seen = suite_of(op), Counter()
    strata = cases.strata(op)

    def each(drawn):
        assume(cases.is_clear(op, drawn.inputs))
        seen[drawn.stratum] += 1
        try:
            check(suite, drawn)
        except errors.OverBudgetError:
            seen["redrawn"] += 1
            check_redrawn(suite, drawn)

    cases.each_stratum(op, large, examples(isa), each)
    for stratum in strata:
        assert seen[stratum] > 1, stratum
    assert seen["redrawn"] <= max(1, LUCK * (seen.total() - seen["redrawn"]))


def test_an_error_is_not_taken_for_bad_luck():
    """Eight times the rounding of float32, in one element of each result."""
    suite = suite_of("additive_attention")
    exact = suite.run

    def run(inputs, backend):
        context, weights = exact(inputs, backend)
        if backend == "cpu":
            error = torch.zeros_like(weights)
            error[0, 0, 0] = 8 * torch.finfo(torch.float32).eps
            weights = weights + error
        return context, weights

    suite.run = run

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(cases.drawn(suite.op, False))
    def each(drawn):
        with pytest.raises(errors.OverBudgetError, match="over the budget"):
            check(suite, drawn)
        with pytest.raises(AssertionError, match="over"):
            check_redrawn(suite, drawn)

    each()


@pytest.mark.parametrize("op", sorted(OPS))
def test_drawn_arguments_are_accepted_and_past_their_tiles(op):
    """By plain torch, so also where no kernel is; and no two are the same."""
    suite, seen = suite_of(op), set()

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(cases.drawn(op, True))
    def each(drawn):
        seen.add(repr(drawn))
        assert all(o.isfinite().all() for o in suite.run(drawn.inputs, "torch"))
        largest = max(max(x.shape, default=0) for x in tensors(drawn.inputs))
        assert largest > draws.COLUMNS

    each()
    assert len(seen) > 5


def tensors(inputs):
    for value in inputs.values():
        several = value if isinstance(value, (list, tuple)) else [value]
        yield from (x for x in several if isinstance(x, torch.Tensor))
