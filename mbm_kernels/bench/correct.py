"""No speed without a right result: the error rule of mbm_kernels.testing, before any timing."""

from collections.abc import Callable

import torch
from torch import Tensor

from mbm_kernels.bench.benchmark import (
    BOTH,
    Benchmark,
    Case,
    Form,
    Inputs,
    Prepared,
    as_called,
    flat_outputs,
    prepare,
)
from mbm_kernels.testing.errors import assert_matches, max_abs
from mbm_kernels.testing.inputs import map_floating

NUDGE = 1e-5  # relative; ten times what float32 sums of 1000 terms are off
SEEDS = 20
SAME_MATHS = 1e-3  # a stock form further than this from the truth computes something else


class WrongResult(Exception):
    """A form's result breaks the error rule, so that it has no speed."""


def _evaluate(prepared: Prepared, which: str, positive: bool = False) -> dict[str, Tensor]:
    """Outputs, or gradients of sum(output * grad), by name; grads are the same for every form."""
    if which != BOTH:
        outputs = flat_outputs(prepared.forward())
        return {f"output {i}": output for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    outputs = flat_outputs(prepared.forward())
    grads = [torch.randn(o.numel(), generator=generator).reshape(o.shape) for o in outputs]
    # A scalar is a loss.
    grads = [g if g.dim() else torch.ones(()) for g in grads]
    prepared.grads = [
        (g.abs() if positive else g).to(o) for g, o in zip(grads, outputs, strict=True)
    ]
    found = dict(zip(prepared.leaves, prepared.both(), strict=True))
    prepared.grads = []
    return found


def check(
    benchmark: Benchmark,
    case: Case,
    which: str,
    backend: str = "auto",
    place: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> dict[str, float]:
    """The largest error of `mbm` as a share of its budget, by output or gradient.

    Args:
        place: brings inputs to the dtype and device that are measured.

    Raises:
        WrongResult: naming the form, the result, its error and the budget.
    """
    small = case.for_check(which)
    inputs = place(_inputs(benchmark, small, which))
    diff = benchmark.differentiable(inputs)
    definition = as_called(benchmark.definition())
    reference = Form(definition, backward_from=benchmark.backward_from)
    double = map_floating(inputs, Tensor.double)
    truth = _evaluate(prepare(reference, double, diff), which)
    if benchmark.positive:
        positive = prepare(reference, map_floating(double, Tensor.abs), diff)
        absolute = _evaluate(positive, which, positive=True)
    else:
        absolute = dict.fromkeys(truth, max(truth.values(), key=max_abs))
    forms = {n: f for n, f in benchmark.stock(small).items() if which in f.passes and not f.compile}
    results = {
        name: _aligned(_evaluate(prepare(form, inputs, diff), which), truth, name)
        for name, form in forms.items()
    }
    yardstick = next(iter(results.values()))
    same = max(SAME_MATHS, *(16 * torch.finfo(x.dtype).eps for x in yardstick.values()))
    for name, result in results.items():
        for key in truth:
            error, scale = max_abs(result[key].double() - truth[key]), max_abs(truth[key])
            if error > same * max(scale, max_abs(absolute[key])):
                raise WrongResult(
                    f"{benchmark.op}, {small.label}: stock form {name!r} computes something else: "
                    f"{key} differs by {error:.3g} where the truth reaches {scale:.3g}"
                )
    ours = _evaluate(prepare(benchmark.mbm(backend), inputs, diff), which)
    ours = _aligned(ours, truth, "mbm")
    shares = {}
    for key in truth:
        try:
            budget = assert_matches(
                ours[key],
                truth[key],
                yardstick[key],
                absolute[key],
                gradient=which == BOTH,
                extra=benchmark.extra,
                what=f"gradient of {key}" if which == BOTH else key,
            )
        except AssertionError as error:
            raise WrongResult(f"{benchmark.op}, {small.label}: {error}") from None
        error_found = max_abs(ours[key].double() - truth[key])
        shares[key] = error_found / budget.limit if budget.limit else 0.0
    return shares


def _inputs(benchmark: Benchmark, case: Case, which: str) -> Inputs:
    """The case's inputs; for gradients with kinks, a seed at which none of them is near."""
    first = benchmark.inputs(case)
    if which != BOTH or not benchmark.kinks:
        return first
    definition = as_called(benchmark.definition())
    reference = Form(definition, backward_from=benchmark.backward_from)
    for seed in range(SEEDS):
        inputs = benchmark.inputs(case, seed)
        diff = benchmark.differentiable(inputs)
        double = map_floating(inputs, Tensor.double)
        truth = _evaluate(prepare(reference, double, diff), which)
        # Of a step and its opposite one crosses what is nearer than the step.
        near = [
            _evaluate(prepare(reference, map_floating(double, _nudge(step)), diff), which)
            for step in (NUDGE, -NUDGE)
        ]
        if all(
            max_abs(n[key] - value) <= SAME_MATHS * max_abs(value)
            for n in near
            for key, value in truth.items()
        ):
            return inputs
    return first


def _nudge(step: float) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    return lambda x: x * (1 + step * torch.randn(x.shape, generator=generator))


def _aligned(results: dict[str, Tensor], truth: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The results in the truth's shapes: nn.GRU's h_n has a dimension for its one layer."""
    if len(results) < len(truth):
        raise WrongResult(f"{form}: got {len(results)} results, expected {len(truth)}")
    aligned = {}
    for key, expected in truth.items():
        result = results[key]
        if result.numel() != expected.numel():
            raise WrongResult(
                f"{form}: {key} has shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
            )
        aligned[key] = result.reshape(expected.shape)
    return aligned
