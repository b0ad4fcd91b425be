"""The fastest PyTorch baseline: one product over the concatenation; where that saves enough
multiplications, one per run of equal leading dimensions, summed by broadcasting."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core.problem import derived
from mbm_kernels._core.tracing import in_functorch, may_need_grad
from mbm_kernels.ops.concat_linear.problem import Problem, Shape

# Multiplications saved from which splitting pays (figures in NOTES.md): in a forward; in training,
# which also splits the weight and puts its gradient together again.
LEAST_SAVED = 200_000
LEAST_SAVED_TRAINING = 300_000
LEAST_SAVED_FOR_WEIGHT = 18  # times its elements, in training


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


class _Plan:
    """What follows from the inputs' shapes alone."""

    def __init__(self, p: Problem):
        shapes, self.leading = p.shapes, p.leading
        # Elements that broadcasting adds to the inputs.
        self.repeated = sum((p.rows - math.prod(s[:-1])) * s[-1] for s in shapes)
        self.rank = max(len(shape) for shape in shapes)
        self.symbolic = any(isinstance(size, torch.SymInt) for s in shapes for size in s)
        # Neighbours of equal leading dimensions: one product is no slower than two.
        self.runs: list[list[int]] = []
        previous: Shape = ()
        for i, shape in enumerate(shapes):
            padded = (*(1,) * (self.rank - len(shape)), *shape[:-1])
            if i > 0 and padded == previous:
                self.runs[-1].append(i)
            else:
                self.runs.append([i])
            previous = padded
        self.widths = [sum(shapes[i][-1] for i in run) for run in self.runs]


def fwd(p: Problem, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    if len(inputs) == 1:
        return (F.linear(inputs[0], weight, bias),)
    plan = derived(p, "torch", _Plan)
    if torch.compiler.is_compiling() or plan.symbolic:  # a choice would pin symbols
        return (_split((inputs, weight, bias), plan, True),)
    trains, least = may_need_grad((weight, *inputs)), LEAST_SAVED
    if trains:
        least = LEAST_SAVED_TRAINING + LEAST_SAVED_FOR_WEIGHT * weight.numel()
    if plan.repeated * weight.size(0) >= least:
        return (_split((inputs, weight, bias), plan, trains),)
    leading = plan.leading
    joined = [x if x.shape[:-1] == leading else x.expand(*leading, -1) for x in inputs]
    return (F.linear(torch.cat(joined, -1), weight, bias),)


def _split(tensors: Sequence[Any], plan: _Plan, trains: bool) -> Tensor:
    inputs, weight, bias = tensors
    joined = [inputs[run[0]] if len(run) == 1 else _joined(inputs, run, plan) for run in plan.runs]
    if len(joined) == 1:
        return F.linear(joined[0], weight, bias)
    weights = torch.split(weight, plan.widths, -1)
    # A product of the full shape first, so that the others can be added in place.
    first = next((i for i, x in enumerate(joined) if x.shape[:-1] == plan.leading), 0)
    y = F.linear(joined[first], weights[first], bias)
    for i, x in enumerate(joined):
        if i != first:
            part = F.linear(x, weights[i])
            # In place it takes autograd longer, and vmap cannot write a batched part into an
            # unbatched sum.
            in_place = not trains and y.shape[:-1] == plan.leading and not in_functorch()
            y = y.add_(part) if in_place else y + part
    return y


def _joined(inputs: Sequence[Tensor], run: list[int], plan: _Plan) -> Tensor:
    parts = [inputs[i] for i in run]
    return torch.cat([x.reshape(*(1,) * (plan.rank - x.dim()), *x.shape) for x in parts], -1)
