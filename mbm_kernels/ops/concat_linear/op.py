"""A linear layer over concatenated, broadcast inputs: the public function and its registration."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Calls, Checked
from mbm_kernels._core.spec import Spec
from mbm_kernels._core.tracing import in_functorch, may_need_grad
from mbm_kernels.ops.concat_linear import backend_torch, reference

NAME = "concat_linear"


def _fake(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return weight.new_empty(*leading, weight.size(0))


def _products(inputs: Sequence[Tensor], weight: Tensor, **_: Any) -> list[Product]:
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return [product(2 * math.prod(leading) * weight.numel(), ("inputs",), ("weight",))]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor[] inputs, Tensor weight, Tensor? bias",
        outputs=("y",),
        differentiable=("inputs", "weight", "bias"),
    ),
    fake=_fake,
    reference=reference.concat_linear,
    torch_fwd=backend_torch.fwd,
    products=_products,
)
_calls: Calls[Checked] = Calls()


def concat_linear(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """A linear layer over the concatenation of inputs that broadcast against each other.

    Equivalent to:
        leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        F.linear(torch.cat([x.expand(*leading, -1) for x in inputs], -1), weight, bias)

    An input that is repeated by the broadcast, such as an image vector [B, 1, C] beside words
    [B, T, C'], is multiplied once and not once for each repetition.

    Args:
        inputs: sequence of [..., C_i], floating; the leading dimensions broadcast.
        weight: [K, C] with C = sum of C_i, columns in the order of the inputs.
        bias: [K].
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [..., K] with the broadcast leading dimensions.

    Raises:
        TypeError: an argument is not of the right kind, or dtypes differ outside autocast.
        ValueError: no inputs, or shapes, devices or the backend's name do not fit.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least; where inputs broadcast, partial products are
        rounded to the inputs' dtype before they are added.

    Source: the splitting of a product over concatenated operands is elementary algebra.
    """
    if not isinstance(inputs, (list, tuple)):
        expected = "a list or tuple of tensors"
        checks.fail(NAME, "inputs", checks.describe(inputs), expected, "wrap it", TypeError)
    tensors = (*inputs, weight) if bias is None else (*inputs, weight, bias)
    kind = (backend, len(inputs), bias is None)
    if call := _calls.get(tensors, kind):
        return OP.run(call, (inputs, weight, bias))  # type: ignore[no-any-return]
    rows = _check_shapes(inputs, weight, bias)
    cast = autocast.cast(*inputs, weight, bias)
    parts, (weight, bias) = list(cast[: len(inputs)]), cast[len(inputs) :]
    named = [(f"inputs[{i}]", x) for i, x in enumerate(parts)]
    checks.same_floating(NAME, (*named, ("weight", weight), ("bias", bias)))
    sizes = _sizes(parts, rows, weight.size(1), weight.size(0))
    _calls.remember(Checked((), weight.device, weight.dtype, dict(sizes)), backend, tensors, kind)
    y: Tensor = OP(backend, parts, weight, bias, sizes=sizes)
    return y


def _check_shapes(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> int:
    """The number of rows of the result."""
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
    return math.prod(leading)


def _sizes(inputs: Sequence[Tensor], rows: int, features: int, out_features: int) -> dict[str, int]:
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, run by concat_linear where that is predicted to be faster."""
    fits = x.dim() > 0 and x.size(-1) == weight.size(1) and x.dtype is weight.dtype
    if not fits or x.device != weight.device or autocast.enabled(x.device) or in_functorch():
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    sizes = _sizes([x], math.prod(x.shape[:-1]), weight.size(1), weight.size(0))
    sizes["training"] = int(may_need_grad(tensors))
    chosen = dispatch.select(NAME, "auto", x.device, x.dtype, sizes)
    if chosen == "torch":
        return F.linear(x, weight, bias)
    y: Tensor = OP(chosen, [x], weight, bias, sizes=sizes)
    return y
