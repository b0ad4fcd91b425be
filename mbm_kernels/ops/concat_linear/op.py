"""A linear layer over concatenated, broadcast inputs: the public function and its registration."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch, tracing
from mbm_kernels._core.flops import Product, product
from mbm_kernels._core.op import Op
from mbm_kernels._core.spec import Spec
from mbm_kernels._core.tracing import in_functorch, may_need_grad
from mbm_kernels.ops.concat_linear import backend_torch, problem, reference
from mbm_kernels.ops.concat_linear.problem import NAME, PROBLEMS


def _fake(*tensors: Any) -> Tensor:
    p, weight = problem.find(*tensors), tensors[1]
    made: Tensor = weight.new_empty(*p.leading, weight.size(0))
    return made


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
    problem=problem.find,
)


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
        if tracing.takes_over((inputs,)):
            return tracing.deferred(concat_linear, locals())  # type: ignore[no-any-return]
        expected = "a list or tuple of tensors"
        checks.fail(NAME, "inputs", checks.describe(inputs), expected, "wrap it", TypeError)
    tensors = (*inputs, weight) if bias is None else (*inputs, weight, bias)
    kind = (backend, len(inputs), bias is None)
    if call := PROBLEMS.call(tensors, kind):
        return OP.run(call, (inputs, weight, bias))  # type: ignore[no-any-return]
    if tracing.takes_over(tensors):
        return tracing.deferred(concat_linear, locals())  # type: ignore[no-any-return]
    problem.check_shapes((inputs, weight, bias))
    cast = autocast.cast(*inputs, weight, bias)
    parts = list(cast[: len(inputs)])
    checked = (parts, *cast[len(inputs) :])
    named = [(f"inputs[{i}]", x) for i, x in enumerate(parts)]
    checks.same_floating(NAME, (*named, ("weight", checked[1]), ("bias", checked[2])))
    y: Tensor = OP.run_first(PROBLEMS, problem.find(*checked), (backend, tensors, kind), checked)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, run by concat_linear where that is predicted to be faster."""
    y: Tensor
    tensors = (x, weight) if bias is None else (x, weight, bias)
    kind = ("auto", 1, bias is None)  # as of concat_linear
    call = PROBLEMS.call(tensors, kind)
    if call is None:
        chosen, sizes = linear_choice(x, weight, bias)
        if not sizes or (bias is not None and bias.shape != weight.shape[:1]):
            return F.linear(x, weight, bias)
        if not torch.compiler.is_compiling():
            call = PROBLEMS.remember(problem.find([x], weight, bias), "auto", tensors, kind)
        if call is None and chosen == "torch":
            return F.linear(x, weight, bias)
        if call is None:
            y = OP(chosen, [x], weight, bias, sizes=sizes)
            return y
    y = OP.run(call, ([x], weight, bias))
    return y


def linear_choice(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[str, dict[str, int]]:
    """The backend that `linear` takes, and the sizes that it goes by."""
    fits = x.dim() > 0 and x.size(-1) == weight.size(1) and x.dtype is weight.dtype
    fits = fits and (bias is None or (bias.dtype is x.dtype and bias.device == x.device))
    if not fits or x.device != weight.device or autocast.enabled(x.device) or in_functorch():
        return "torch", {}
    tensors = (x, weight) if bias is None else (x, weight, bias)
    sizes = problem.sizes_of([x], x.shape[:-1], weight)
    sizes["training"] = int(may_need_grad(tensors))
    return dispatch.select(NAME, "auto", x.device, x.dtype, sizes), sizes
