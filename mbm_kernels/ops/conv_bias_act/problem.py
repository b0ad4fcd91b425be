"""The problem descriptor of a convolution with its epilogue."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import checks
from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS, Pair

NAME = "conv_bias_act"
NO_POOL = (1, 1, 1, 1, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What follows from the shapes, strides, dtypes and options of a call.

    The options are explicit: stride and dilation for (Y, X), padding as top, bottom, left, right,
    max_pool as kernel, stride and padding, each for (Y, X). Sizes are of the batched form.
    """

    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    activation: str | None
    max_pool: tuple[int, ...] | None
    device: torch.device
    dtype: torch.dtype  # of all but bytes in x
    x_bytes: bool  # x is uint8
    x_shape: tuple[int, ...]  # [B, C, Y, X]
    x_strides: tuple[int, ...]  # of the tensor as given, as those below
    weight_shape: tuple[int, ...]  # [K, C / groups, R, S]
    weight_strides: tuple[int, ...]
    bias_strides: tuple[int, ...] | None
    residual_strides: tuple[int, ...] | None
    unbatched: bool
    conv: Pair  # Y', X' after the convolution
    out: Pair  # Y'', X'' after the pool
    x_channels_last: bool
    weight_channels_last: bool
    residual_channels_last: bool
    sizes: dict[str, int]
    derived: dict[Any, Any] = field(default_factory=dict)  # by backends, under keys of their own

    @property
    def options(self) -> tuple[Any, ...]:
        """As the registered operation takes them."""
        head = (self.stride, self.padding, self.dilation)
        return (*head, self.groups, self.activation, self.max_pool)

    @property
    def channels_last(self) -> bool:
        """The layout of the result, as torch's convolution decides it."""
        return not self.unbatched and (self.x_channels_last or self.weight_channels_last)

    @property
    def pool(self) -> tuple[int, ...]:
        return NO_POOL if self.max_pool is None else self.max_pool

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """[B, Y'', X'', K], of places and of z."""
        return (self.x_shape[0], *self.out, self.weight_shape[0])

    @property
    def saves_places(self) -> bool:
        """Whether the backward reads a byte for each y: where in its window it stood, and which of
        two values f' has."""
        return self.activation is not None or self.max_pool is not None

    @property
    def saves_z(self) -> bool:
        """Whether it reads what the activation was applied to, f' not following from places."""
        return self.activation not in geometry.BY_PLACE

    @property
    def by_place(self) -> bool:
        """Whether GPU kernels read or write a byte for each y: else z alone tells f'."""
        return self.max_pool is not None or not self.saves_z

    @property
    def z_dtype(self) -> torch.dtype:
        """float32 on CPUs, whose kernels compute in it; else rounded as stock's saved tensors."""
        return torch.float32 if self.device.type == "cpu" else self.dtype


def build(
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
) -> Problem:
    """The problem of arguments in the registered operation's form, sizes checked.

    Raises:
        ValueError: shapes or sizes do not fit.
        RuntimeError: as torch, for an image without pixels.
    """
    unbatched = x.dim() == 3
    top, bottom, left, right = padding
    edges, window = (top, bottom, left, right), None if max_pool is None else tuple(max_pool)
    steps, spread = (stride[0], stride[1]), (dilation[0], dilation[1])
    kernel = (weight.shape[2], weight.shape[3])
    conv = geometry.convolved_size(NAME, x, kernel, steps, edges, spread)
    out = geometry.pooled_size(NAME, conv, window)
    check_operands(x, weight, bias, residual, conv)
    x_shape = (1, *x.shape) if unbatched else tuple(x.shape)
    return Problem(
        stride=steps,
        padding=edges,
        dilation=spread,
        groups=groups,
        activation=activation,
        max_pool=window,
        device=x.device,
        dtype=weight.dtype,
        x_bytes=x.dtype == torch.uint8,
        x_shape=x_shape,
        x_strides=x.stride(),
        weight_shape=tuple(weight.shape),
        weight_strides=weight.stride(),
        bias_strides=None if bias is None else bias.stride(),
        residual_strides=None if residual is None else residual.stride(),
        unbatched=unbatched,
        conv=conv,
        out=out,
        x_channels_last=geometry.is_channels_last(x),
        weight_channels_last=geometry.is_channels_last(weight),
        residual_channels_last=residual is not None and geometry.is_channels_last(residual),
        sizes=_dispatch_sizes(x_shape, weight, steps, spread, groups, activation, window)
        | {
            # A map of one pixel is both.
            "layout": int(geometry.is_channels_last(x) or x.stride(-3) == 1),
            "conv_y": conv[0],
            "conv_x": conv[1],
            "unpadded": int(not any(edges)),
            "stride_y": steps[0],
            "stride_x": steps[1],
            "top": edges[0],
            "left": edges[2],
            "residual": int(residual is not None),
        },
    )


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, conv: Pair
) -> None:
    """Whether bias and residual fit a convolution's result of `conv` pixels."""
    out_channels = weight.shape[0]
    if bias is not None:
        checks.tensor(NAME, "bias", bias, 1)
        checks.shape(NAME, "bias", bias, "K", (out_channels,))
    if residual is not None:
        checks.tensor(NAME, "residual", residual, x.dim())
        letters = "B, K, Y', X'" if x.dim() == 4 else "K, Y', X'"
        checks.shape(NAME, "residual", residual, letters, (*x.shape[:-3], out_channels, *conv))


def _dispatch_sizes(
    x_shape: Sequence[int],
    weight: Tensor,
    stride: Pair,
    dilation: Pair,
    groups: int,
    activation: str | None,
    window: tuple[int, ...] | None,
) -> dict[str, int]:
    """What dispatch judges by."""
    batch, channels, height, width = x_shape
    return {
        "B": batch,
        "C": channels,
        "K": weight.shape[0],
        "Y": height,
        "X": width,
        "R": weight.shape[2],
        "S": weight.shape[3],
        "stride": geometry.common(stride),
        "dilation": geometry.common(dilation),
        "groups": groups,
        "depthwise": int(groups == channels == weight.shape[0]),
        "activation": ACTIVATIONS.index(activation),
        "pool": geometry.pool_kind(window),
        "pool_area": 0 if window is None else window[0] * window[1],
    }


PROBLEMS: Problems[Problem] = Problems(build, inputs=4)
find = PROBLEMS.find
