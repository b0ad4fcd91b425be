"""Convolution with its epilogue: the public function and its registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks
from mbm_kernels._core.flops import Product
from mbm_kernels._core.op import Op
from mbm_kernels.ops.conv_bias_act import backend_torch, geometry, reference
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS

NAME = "conv_bias_act"


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    max_pool: Sequence[int] | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    top, bottom, left, right = padding
    size = geometry.convolved_size(
        NAME,
        x,
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        (top, bottom, left, right),
        (dilation[0], dilation[1]),
    )
    size = geometry.pooled_size(NAME, size, None if max_pool is None else tuple(max_pool))
    channels_last = geometry.is_channels_last(x) or (
        x.dim() == 4 and geometry.is_channels_last(weight)
    )
    y = x.new_empty(*x.shape[:-3], weight.shape[0], *size).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    return y, *geometry.saved(y, activation, max_pool, save)


def _products(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **_: Any,
) -> list[Product]:
    top, bottom, left, right = padding
    height, width = geometry.convolved_size(
        NAME,
        x,
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        (top, bottom, left, right),
        (dilation[0], dilation[1]),
    )
    flops = 2 * (x.shape[0] if x.dim() == 4 else 1) * height * width * weight.numel()
    # torch counts the weight's gradient as if there were no groups.
    return [Product(flops, ((flops, ("x",)), (flops * groups, ("weight",))))]


OP = Op(
    NAME,
    fwd="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, SymInt groups, str? activation, SymInt[]? max_pool,"
    " bool save) -> (Tensor y, Tensor places, Tensor z)",
    bwd="(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor places,"
    " Tensor z, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups,"
    " str? activation, SymInt[]? max_pool, bool[] needs)",
    diff=("x", "weight", "bias", "residual"),
    fake=_fake,
    reference=reference.conv_bias_act,
    torch_fwd=backend_torch.fwd,
    products=_products,
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
        x: [B, C, Y, X] or [C, Y, X], floating, NCHW or channels_last; the result has the same
            layout (and, as in torch, is channels_last if `weight` is).
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
    checks.tensor(NAME, "x", x, (3, 4))
    checks.tensor(NAME, "weight", weight, 4)
    steps = geometry.pair(NAME, "stride", stride, 1)
    spread = geometry.pair(NAME, "dilation", dilation, 1)
    out_channels, group_channels, *kernel_sizes = weight.shape
    kernel = (kernel_sizes[0], kernel_sizes[1])
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
    if bias is not None:
        checks.tensor(NAME, "bias", bias, 1)
        checks.shape(NAME, "bias", bias, "K", (out_channels,))
    if residual is not None:
        checks.tensor(NAME, "residual", residual, x.dim())
        letters = "B, K, Y', X'" if x.dim() == 4 else "K, Y', X'"
        checks.shape(NAME, "residual", residual, letters, (*x.shape[:-3], out_channels, *size))
    x, weight, bias, residual = autocast.cast(x, weight, bias, residual)
    named = (("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    checks.same_floating(NAME, named)
    sizes = {
        "B": x.shape[0] if x.dim() == 4 else 1,
        "C": group_channels * groups,
        "K": out_channels,
        "Y": x.shape[-2],
        "X": x.shape[-1],
        "R": kernel[0],
        "S": kernel[1],
        "stride": geometry.common(steps),
        "dilation": geometry.common(spread),
        "groups": groups,
        "depthwise": int(groups == group_channels * groups == out_channels),
        "layout": int(geometry.is_channels_last(x)),
        "conv_y": size[0],
        "conv_x": size[1],
        "unpadded": int(not any(edges)),
        "residual": int(residual is not None),
        "activation": ACTIVATIONS.index(activation),
        "pool": geometry.pool_kind(window),
        "pool_area": 0 if window is None else window[0] * window[1],
    }
    # By which dispatch tables tell work enough for a kernel: 4x4 tiles of the batch, and elements.
    sizes["tiles"] = sizes["B"] * -(-sizes["Y"] // 4) * -(-sizes["X"] // 4)
    sizes["elements"] = x.numel()
    y: Tensor = OP(
        backend,
        x,
        weight,
        bias,
        residual,
        steps,
        edges,
        spread,
        groups,
        activation,
        window,
        sizes=sizes,
    )
    return y


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
