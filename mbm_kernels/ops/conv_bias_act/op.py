"""Convolution with its epilogue: the public function and its registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, tracing
from mbm_kernels._core.flops import Product
from mbm_kernels._core.op import Op
from mbm_kernels._core.problem import Call
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.conv_bias_act import backend_torch, geometry, problem, reference
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.ops.conv_bias_act.problem import NAME, PROBLEMS, Problem

Tensors = tuple[Any, Any, Any, Any]  # x, weight, bias, residual


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, save = rest
    p = problem.find(x, weight, bias, residual, *options)
    y = weight.new_empty(*x.shape[:-3], weight.shape[0], *p.out).contiguous(
        memory_format=torch.channels_last if p.channels_last else torch.contiguous_format
    )
    places = y.new_empty(p.saved_shape if save and p.saves_places else (0,), dtype=torch.uint8)
    return y, places, y.new_empty(p.saved_shape if save and p.saves_z else (0,), dtype=p.z_dtype)


def _products(x: Tensor, weight: Tensor, **rest: Any) -> list[Product]:
    p = problem.find(x, weight, *(rest[name] for name in OP.reference_inputs[2:]))
    height, width = p.conv
    flops = 2 * p.x_shape[0] * height * width * weight.numel()
    # torch counts the weight's gradient as if there were no groups.
    return [Product(flops, ((flops, ("x",)), (flops * p.groups, ("weight",))))]


OP = Op(
    Spec(
        NAME,
        inputs="Tensor x, Tensor weight, Tensor? bias, Tensor? residual",
        options="SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups,"
        " str? activation, SymInt[]? max_pool",
        outputs=("y",),
        state=("places", "z"),
        saved=("places", "z"),
        differentiable=("x", "weight", "bias", "residual"),
        save="any",
    ),
    fake=_fake,
    reference=reference.conv_bias_act,
    torch_fwd=backend_torch.fwd,
    products=_products,
    problem=problem.find,
)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    max_pool: int | tuple[Any, Any, Any] | None = None,
    backend: str = "auto",
) -> Tensor:
    """2D convolution followed by bias, residual, activation and maximum pooling, in this order.

    Equivalent to:
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        z = z if residual is None else z + residual
        y = F.max_pool2d(act(z), *max_pool)

    Args:
        x: [B, C, Y, X] or [C, Y, X], NCHW or channels_last; the result has the same layout (and, as
            in torch, is channels_last if `weight` is). Floating, or uint8, which every backend
            takes as its values, 0 to 255: the result then is of `weight`'s dtype.
        weight: [K, C / groups, R, S].
        bias: [K].
        stride, dilation: int or pair for (Y, X). A stride past the padded input has one output.
        padding: int, pair, "same" (stride 1 only; one more below and right where the kernel is
            even) or "valid"; at most 2^29 pixels on each side.
        groups: divides C and K.
        residual: of the convolution's shape, [B, K, Y', X'], before pooling.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (erf),
            "gelu_tanh", "hardswish", "sigmoid" or "tanh".
        max_pool: None, k (stride k, no padding) or (kernel, stride, padding), each an int or a
            pair for (Y, X); padding of at most half the kernel. Of equal values the first has the
            gradient; NaN wins.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [B, K, Y'', X''], or [K, Y'', X''] for an unbatched `x`.

    Raises:
        TypeError: an argument is not of the right kind, or dtypes differ outside autocast.
        ValueError: shapes, sizes, devices or names do not fit.
        RuntimeError: for an image without pixels, as torch.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        Sums are accumulated in float32 at least. Under autocast `residual` is cast as well.

    Source: the operations are torch.nn.functional's conv2d and max_pool2d.
    """
    options = (stride, padding, dilation, groups, activation, max_pool)
    return convolve((x, weight, bias, residual), options, backend)


def convolve(tensors: Tensors, options: tuple[Any, ...], backend: str) -> Tensor:
    """`conv_bias_act` of x, weight, bias and residual; options in the order of their names there:
    stride, padding, dilation, groups, activation, max_pool."""
    call, tensors, found = described(tensors, options, backend)
    if call is not None:
        return OP.run(call, tensors)  # type: ignore[no-any-return]
    if found is None:
        names = (*OP.reference_inputs, "backend")
        local = dict(zip(names, (*tensors, *options, backend), strict=True))
        return tracing.deferred(conv_bias_act, local)  # type: ignore[no-any-return]
    return OP(backend, *tensors, *found.options, sizes=dict(found.sizes))  # type: ignore[no-any-return]


def described(
    tensors: Tensors, options: tuple[Any, ...], backend: str
) -> tuple[Call[Problem] | None, Tensors, Problem | None]:
    """The call that `convolve` runs where it is plain eager code, its tensors and its problem.

    There is none where an argument only stands for a tensor.
    """
    x, weight, bias, residual = tensors
    if residual is None:
        given: Any = (x, weight) if bias is None else (x, weight, bias)
        kind = (*options, backend, len(given))
    else:
        given = tuple(t for t in tensors if t is not None)
        kind = (*options, backend, -len(given))
    call = PROBLEMS.call(given, kind)
    if call is not None:
        return call, tensors, call.problem
    if tracing.takes_over(given):
        return None, tensors, None
    tensors, found = PROBLEMS.checked(tensors, options, _checked)
    return PROBLEMS.remember(found, backend, given, kind), tensors, found


def _checked(tensors: Tensors, options: Sequence[Any]) -> tuple[Tensors, Problem]:
    """The tensors as autocast wants them and their problem; raises for what does not fit."""
    x, weight, bias, residual = tensors
    stride, padding, dilation, groups, activation, max_pool = options
    checks.tensor(NAME, "x", x, (3, 4))
    checks.tensor(NAME, "weight", weight, 4)
    steps = geometry.pair(NAME, "stride", stride, 1)
    spread = geometry.pair(NAME, "dilation", dilation, 1)
    kernel = (weight.shape[2], weight.shape[3])
    _check_channels(x, weight, groups)
    edges = geometry.explicit_padding(NAME, padding, kernel, steps, spread)
    window = geometry.pool_window(NAME, max_pool)
    checks.choice(NAME, "activation", activation, ACTIVATIONS)
    size = geometry.convolved_size(NAME, x, kernel, steps, edges, spread)
    geometry.pooled_size(NAME, size, window)
    spread = (spread[0] if kernel[0] > 1 else 1, spread[1] if kernel[1] > 1 else 1)
    spans = [d * (k - 1) + 1 for d, k in zip(spread, kernel, strict=True)]
    padded = (x.shape[-2] + edges[0] + edges[1], x.shape[-1] + edges[2] + edges[3])
    steps = geometry.taken(steps, spans, padded)
    window = geometry.pool_taken(window, size)
    problem.check_operands(x, weight, bias, residual, size)
    x, weight, bias, residual = autocast.cast(x, weight, bias, residual)
    _check_dtypes(x, (("weight", weight), ("bias", bias), ("residual", residual)))
    cast = (x, weight, bias, residual)
    return cast, problem.find(*cast, steps, edges, spread, groups, activation, window)


def _check_dtypes(x: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    if x.dtype == torch.uint8:
        checks.same_floating(NAME, others)
        weight = others[0][1]
        assert weight is not None
        checks.same_device(NAME, "x", x, "weight", weight)
        return
    if x.dtype not in checks.FLOATING:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in checks.FLOATING)
        expected = f"{allowed}, or uint8, which is taken as its values"
        checks.fail(NAME, "x", x.dtype, expected, "convert it with .to(...)", TypeError)
    checks.same_floating(NAME, (("x", x), *others))


def _check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    channels = x.shape[-3]
    out_channels, group_channels, kernel_y, kernel_x = weight.shape
    if not isinstance(groups, int) or isinstance(groups, bool):
        got = checks.describe(groups)
        checks.fail(NAME, "groups", got, "an int", "pass a number", TypeError)
    if groups < 1 or out_channels % groups != 0:
        expected = f"a positive divisor of K = {out_channels}"
        checks.fail(NAME, "groups", groups, expected, "correct it")
    if channels != group_channels * groups:
        expected = f"{group_channels} * groups = {group_channels * groups} channels, as weight has"
        checks.fail(NAME, "x", f"{channels} channels", expected, "check groups and the weight")
    if channels == 0 or out_channels == 0 or kernel_y == 0 or kernel_x == 0:
        expected = "at least one channel in and out and a kernel of at least 1"
        checks.fail(NAME, "weight", f"shape {list(weight.shape)}", expected, "check its sizes")
