"""Drawn inputs of conv_bias_act: each algorithm of its kernels, with every legal pool."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels.testing.draws import COLUMNS, STRATA, Draws, Inputs, draws

MOST_POOL, MOST_POOL_STRIDE = 5, 4  # of a window's sides and steps
WIDENING = ((2, 1, 1), (4, 1, 2))  # their maps are wider than what they pool
KERNELS = ((3, 3), (3, 3), (1, 1), (5, 5), (2, 3), (7, 7), (4, 1))

# By what the kernels go by (README, "The cpu backend"): groups, channels in and out and the rest
# of the convolution's options. A kernel and padding are drawn where it names none.
Layer = dict[str, Any]


def _direct(given: Draws) -> Layer:
    outputs = given.size(COLUMNS)
    return {"channels": 4 + given.size(COLUMNS), "outputs": outputs, "dilation": given.of(1, 2)}


def _strided(given: Draws) -> Layer:
    stride = given.of(2, 2, (3, 2), (1, 2), 4, (9, 5))
    return _direct(given) | {"stride": stride, "dilation": given.of(1, 1, 2, (2, 3))}


def _few(given: Draws) -> Layer:
    return {
        "channels": given.between(1, 4),
        "outputs": given.size(COLUMNS),
        "stride": given.of(1, 1, 2, (3, 2), 5),
        "dilation": given.of(1, 1, 2),
    }


def _pointwise(given: Draws) -> Layer:
    groups = given.of(1, 1, 2)
    channels, outputs = (groups * given.size(COLUMNS) for _ in range(2))
    sizes = {"groups": groups, "channels": channels, "outputs": outputs}
    return sizes | {"kernel": (1, 1), "padding": 0, "channels_last": True}


def _groups(given: Draws) -> Layer:
    groups = given.of(2, 3)
    return {
        "groups": groups,
        "channels": groups * given.of(given.size(COLUMNS), given.between(1, 4)),
        "outputs": groups * given.size(COLUMNS),
    }


def _grouped(given: Draws) -> Layer:
    return _groups(given) | {
        "stride": given.of(1, 1, 2),
        "dilation": given.of(1, 1, 2),
        "channels_last": given.flag(),
    }


def _depthwise(given: Draws) -> Layer:
    channels = 4 + given.size(COLUMNS)
    return {
        "groups": channels,
        "channels": channels,
        "outputs": channels * given.of(1, 1, 2),
        "stride": given.of(1, 1, 2, 3, (1, 4)),
        "dilation": given.of(1, 2),
    }


def _depthwise_rows(given: Draws) -> Layer:
    channels = 4 + given.size(COLUMNS)
    return {
        "groups": channels,
        "channels": channels,
        "outputs": channels,
        "kernel": (given.of(3, 1, 5, 7), given.of(3, 5, 7)),
        "stride": given.of(1, 1, 2, (3, 1), (1, 2), (2, 1)),
        "channels_last": given.of(True, True, False),
    }


def _strided_groups(given: Draws) -> Layer:
    return _groups(given) | {
        "kernel": given.of((3, 3), (5, 5), (2, 3), (7, 7)),
        "stride": given.of(2, 2, (1, 2)),
        "planes": True,
    }


def _strided_depthwise(given: Draws) -> Layer:
    channels = 4 + given.size(COLUMNS)
    return {
        "groups": channels,
        "channels": channels,
        "outputs": channels,
        "kernel": (given.of(3, 5, 7), given.of(3, 5, 7)),
        "stride": given.of(2, 2, (1, 2)),
        "planes": True,
    }


def _winograd(given: Draws) -> Layer:
    # From the channels on that the algorithm takes.
    channels, outputs = (max(16, given.size(COLUMNS)) for _ in range(2))
    return {"channels": channels, "outputs": outputs, "kernel": (3, 3)}


ALGORITHMS: dict[str, Callable[[Draws], Layer]] = {
    "direct": _direct,
    "strided": _strided,
    "few channels": _few,
    "one by one": _pointwise,
    "grouped": _grouped,
    "depthwise": _depthwise,
    "depthwise rows": _depthwise_rows,
    "winograd": _winograd,
    # Of planes that a stride takes apart, which the other two meet by chance.
    "strided groups": _strided_groups,
    "strided depthwise": _strided_depthwise,
}
EPILOGUES = ("plain", "residual", "pool", "residual and pool")
STRATA["conv_bias_act"] = tuple(f"{a}, {e}" for a in ALGORITHMS for e in EPILOGUES)


def _pool(given: Draws, height: int, width: int) -> Any:
    """A legal one: padding of at most half the kernel, a kernel within the padded map."""
    often = [*WIDENING, 2, 2] if min(height, width) > 1 else [*WIDENING]
    if pool := given.of(*often, None, None, None):
        return pool

    def side(pixels: int) -> tuple[int, int, int]:
        kernel = given.between(1, MOST_POOL)
        padding = given.between(max(0, kernel - pixels + 1) // 2, kernel // 2)
        return kernel, given.between(1, MOST_POOL_STRIDE), padding

    return tuple(zip(side(height), side(width), strict=True))


@draws
def conv_bias_act(given: Draws) -> Inputs:
    algorithm, epilogue = str(given.stratum).split(", ")
    layer: Layer = {"groups": 1, "stride": 1, "dilation": 1} | ALGORITHMS[algorithm](given)
    channels, outputs, groups = layer["channels"], layer["outputs"], layer["groups"]
    kernel = layer["kernel"] if "kernel" in layer else given.of(*KERNELS)
    padding = layer["padding"] if "padding" in layer else given.of(0, 1, 1, (1, 2), 2, (5, 0))
    channels_last = layer.get("channels_last", False)
    options = {n: layer[n] for n in ("stride", "dilation", "groups")} | {"padding": padding}
    height, width = (
        max(given.size(20, 12), spread * (taps - 1) + 1)
        for taps, spread in zip(kernel, pair(layer["dilation"]), strict=True)
    )
    batch = given.between(1, 3) if channels_last else given.of(None, 1, 2, 3)
    x = given.randn(*(() if batch is None else (batch,)), channels, height, width) * given.scale
    weight = given.randn(outputs, channels // groups, *kernel)
    weight *= (channels // groups * kernel[0] * kernel[1]) ** -0.5
    before = F.conv2d(x, weight, None, **options)
    residual = given.randn(*before.shape) if "residual" in epilogue else None
    if layer.get("planes", False):
        x, residual = given.keep(x), None if residual is None else given.keep(residual)
    if channels_last:
        x = given.keep(x.contiguous(memory_format=torch.channels_last))
        # Pixels read in place want all three so; else it is of any layout.
        if residual is not None and epilogue == "residual":
            residual = given.keep(residual.contiguous(memory_format=torch.channels_last))
    activations: tuple[str | None, ...] = (None, "relu", "relu", "relu6", "leaky_relu", "silu")
    activations += ("gelu", "gelu_tanh")
    if "pool" not in epilogue:  # a window of saturated values is a window of near ties
        activations += ("sigmoid", "tanh")
    return {
        "x": x,
        "weight": weight,
        "bias": given.randn(outputs) if given.flag() else None,
        **options,
        "residual": residual,
        "activation": given.of(*activations, "hardswish"),
        "max_pool": _pool(given, *before.shape[-2:]) if "pool" in epilogue else None,
    }


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


# Where a derivative jumps.
_KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
_NEAR = 1.5e-6  # of the largest value: Winograd's usual error, twice


def is_clear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    max_pool: Any = None,
    **options: Any,
) -> bool:
    """Whether no value is so near a kink or another of its window that rounding decides."""
    from mbm_kernels.ops.conv_bias_act import geometry, reference

    z = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **options)
    z = z if residual is None else z + residual
    near = _NEAR * float(z.abs().max())
    if any(bool(((z - kink).abs() < near).any()) for kink in _KINKS.get(str(activation), ())):
        return False
    if max_pool is None:
        return True
    y = reference.ACTIVATIONS[activation](z)
    window = geometry.pool_window("cases", max_pool)
    assert window is not None
    pad = (window[5], window[5], window[4], window[4])
    windows = reference._windows(F.pad(y, pad, value=-torch.inf), window[:2], window[2:4], (1, 1))
    if len(windows) == 1:
        return True
    first, second = torch.stack(windows).topk(2, 0).values
    gap = first - second  # equal values are equal in every precision: both are clamped
    return not bool(((gap > 0) & (gap < _NEAR * float(y.abs().max()))).any())
