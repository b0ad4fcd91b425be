"""The problem descriptor of a linear layer over concatenated inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems

NAME = "concat_linear"
# Up to so many rows the kernels read the weight as it is: packing it takes as long as the product.
FEW_ROWS = 64
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides and dtypes of a call."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]  # of the inputs, [..., C_i], as their strides
    strides: tuple[Shape, ...]
    leading: Shape  # of the result
    weight_shape: tuple[int, int]  # [K, sum of C_i]
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[()]:
        return ()

    @property
    def rows(self) -> int:
        return self.sizes["rows"]


def build(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Problem:
    """The problem of these arguments, shapes checked."""
    leading = check_shapes((inputs, weight, bias))
    return Problem(
        device=weight.device,
        dtype=weight.dtype,
        shapes=tuple([tuple(x.shape) for x in inputs]),
        strides=tuple([x.stride() for x in inputs]),
        leading=leading,
        weight_shape=(weight.size(0), weight.size(1)),
        sizes=sizes_of(inputs, leading, weight),
    )


def check_shapes(tensors: Sequence[Any]) -> Shape:
    """The leading dimensions of the result of inputs, weight and bias."""
    inputs, weight, bias = tensors
    if not inputs:
        checks.fail(NAME, "inputs", "none", "at least one tensor", "pass the inputs to join")
    for i, x in enumerate(inputs):
        checks.tensor(NAME, f"inputs[{i}]", x)
        if x.dim() == 0:
            checks.fail(NAME, f"inputs[{i}]", "shape []", "[..., C_i]", "add a dimension")
    try:
        leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    except RuntimeError:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        expected = "leading dimensions that broadcast"
        checks.fail(NAME, "inputs", f"shapes {shapes}", expected, "add dimensions of size 1")
    checks.tensor(NAME, "weight", weight, 2)
    features = sum(x.size(-1) for x in inputs)
    checks.shape(NAME, "weight", weight, "K, sum of C_i", (weight.size(0), features))
    if bias is not None:
        checks.tensor(NAME, "bias", bias, 1)
        checks.shape(NAME, "bias", bias, "K", (weight.size(0),))
    return tuple(leading)


def sizes_of(inputs: Sequence[Tensor], leading: Shape, weight: Tensor) -> dict[str, int]:
    """What dispatch judges by."""
    rows, (out_features, features) = math.prod(leading), weight.shape
    given = [math.prod(x.shape[:-1]) for x in inputs]
    products = sum(r * x.size(-1) for r, x in zip(given, inputs, strict=True))
    return {
        "inputs": len(inputs),
        "rows": rows,
        "shared": int(any(r < rows for r in given)),
        "C": features,
        "K": out_features,
        "elements": out_features * products,
    }


PROBLEMS: Problems[Problem] = Problems(build, inputs=3)
find = PROBLEMS.find
