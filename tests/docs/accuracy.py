"""Errors against float64, ours beside PyTorch's: `python -m tests.docs.accuracy`.

Over the drawn problems of `tests/ops/test_drawn.py`, the same ones at each run.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor

from mbm_kernels._core import native, processor
from mbm_kernels._core.accuracy import max_abs
from mbm_kernels._core.op import OPS
from mbm_kernels.testing import OpSuite, cases
from mbm_kernels.testing.inputs import map_floating
from tests.docs import pages
from tests.ops.test_drawn import suite_of

PROBLEMS = 40
DTYPES = (torch.float32, torch.bfloat16)
Errors = dict[str, list[float]]  # by "cpu" and "torch", one for each result

TEXT = """# Numerical accuracy

Written by `python -m tests.docs.accuracy` with torch {torch}, {isa}, on {device}.

The largest error of a result against the definition in float64, over the result's largest value:
the median and the 90th percentile over {problems} drawn problems of each operation, every output
and every gradient counted. Sizes go past every tile of the kernels, magnitudes from 0.001 to 3.
float64 is given the same rounded inputs, so that what is measured is the computation alone.

What lies beyond the 90th percentile are results that no float32 has: what is left when terms cancel
(the gradient through a softmax over one position), rows of attention that a mask of -1e9 covers
as a whole. PyTorch is as far off there, and the rule below judges them too. In bfloat16 a rounding
may also decide a relu or a maximum the other way, which the gradients show.

These are the CPU kernels; those for GPUs have run in interpreters and emulation alone.

{tables}
float32 rounds to 6e-8, bfloat16 to 4e-3, each of the value rounded. The kernels compute in float32
whatever they are given, and sum in another order than PyTorch; neither is the true one. Winograd's
algorithm (3x3 convolutions) multiplies sums of inputs, which costs about a digit;
`MBM_WINOGRAD=0` turns it off.

## The rule that tests hold

A result's error, in the max-abs norm, may be twice that of PyTorch in the same dtype (three times
for gradients) plus a floor of 4 eps times the definition on the absolute values of its inputs.
Winograd has a constant of its own, 5e-6 of the largest value. `mbm_kernels.check_parity` applies
the same rule to your model, on your inputs.

## Determinism

The kernels' results are bitwise the same from run to run and for any number of threads. They may
differ between instruction sets, and `auto` may choose otherwise on another machine or with another
number of threads: name a backend where bits must repeat.
"""


def page() -> str:
    parts = []
    for title, gradient in (("Outputs", False), ("Gradients", True)):
        rows = [row for op in sorted(OPS) if (row := cells(op, gradient))]
        columns = ["operation"]
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            columns += [f"kernel, {name}", f"PyTorch, {name}"]
        parts.append(f"## {title}\n\n{pages.table(columns, rows)}")
    return TEXT.format(
        torch=torch.__version__.partition("+")[0],
        isa=native.isa(),
        device=processor.name(),
        problems=PROBLEMS,
        tables="\n".join(parts),
    )


def cells(op: str, gradient: bool) -> list[str]:
    suite = suite_of(op)
    if gradient and not suite.diff:
        return []
    row = [f"`{op}`"]
    for dtype in DTYPES:
        found = errors(suite, dtype, gradient)
        row += [f"{statistics.median(e):.1e}, {most(e):.1e}" for e in found.values()]
    return row


def most(errors: list[float]) -> float:
    """Their 90th percentile."""
    return statistics.quantiles(errors, n=10)[-1]


def errors(suite: OpSuite, dtype: torch.dtype, gradient: bool) -> Errors:
    """Relative errors of each result of each problem, by backend."""
    found: Errors = defaultdict(list)

    def each(drawn: cases.Drawn) -> None:
        assume(cases.is_clear(suite.op, drawn.inputs))
        inputs = map_floating(drawn.inputs, lambda x: x.to(dtype))
        truth = evaluate(suite, suite.define, map_floating(inputs, Tensor.double), gradient)
        for backend in ("cpu", "torch"):
            run = lambda given, b=backend: suite.run(given, b)  # noqa: E731
            results = evaluate(suite, run, inputs, gradient)
            for result, true in zip(results, truth, strict=True):
                scale = max_abs(true)
                if scale > 0 and result.is_floating_point():
                    found[backend].append(max_abs(result.double() - true) / scale)

    settings(
        max_examples=PROBLEMS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(cases.drawn(suite.op, True))(each))()
    return found


def evaluate(
    suite: OpSuite, run: Callable[..., Any], inputs: dict[str, Any], gradient: bool
) -> list[Tensor]:
    if not gradient:
        with torch.no_grad():
            return list(run(inputs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outputs = suite.define(map_floating(inputs, Tensor.double))
    grads = [torch.randn(o.shape, generator=generator).bfloat16().double() for o in outputs]
    return list(suite.gradients(run, inputs, grads).values())


if __name__ == "__main__":
    pages.write("accuracy.md", page)
